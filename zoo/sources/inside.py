"""Whether a file of a source lies within it: a link may not lead to what the user did not name."""

from pathlib import Path

from zoo.errors import BadSource


def checked_place(folder: Path, path: Path) -> Path:
    """`path` if it is the folder's own file, or the hub cache's, whose folders hold links to files
    two levels above; raises BadSource for a link that leads elsewhere."""
    if not path.is_symlink() and not folder.is_symlink():
        return path
    home = folder.resolve()
    limit = home.parent.parent if home.parent.name == "snapshots" else home
    if not path.resolve().is_relative_to(limit):
        raise BadSource(
            f"{path} is a link to a file outside of {folder}: copy the file there if it is meant"
        )
    return path
