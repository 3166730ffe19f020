"""Text for prompts: Python's own documentation, which every installation has."""

from pydoc_data.topics import topics


def prose() -> str:
    """All of it, the same each time."""
    return "\n".join(topics[key] for key in sorted(topics))
