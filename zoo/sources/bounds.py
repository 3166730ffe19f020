"""How large the numbers of a model's config may be, checked before anything is built from them.

transformers makes lists of as many entries as a config claims layers, and tables as wide as it
claims heads: a number that no model has must not get that far.
"""

from zoo.errors import BadCheckpoint

MAX_LAYERS = 1024
_LAYERS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "block_count"}
_MAX_COUNT = 1 << 16
_MAX_WIDTH = 1 << 24
_MAX_LENGTH = 1 << 31
_LENGTHS = {"n_positions", "n_ctx", "context_length"}
_COUNTS = ("head_count", "head_count_kv", "expert_count", "expert_used_count", "dimension_count")
_WIDTHS = ("_size", "_dim", "_length", "n_embd", "n_inner", "_rank")


def check_bounds(config: object, source: str) -> None:
    """Refuse a config, or one within it, whose numbers cannot be a model's; raises
    BadCheckpoint."""
    if isinstance(config, list):
        for item in config:
            check_bounds(item, source)
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            _check(str(name), value, source)
        else:
            check_bounds(value, source)


def _check(name: str, value: int, source: str) -> None:
    most = largest(name)
    if abs(value) > most:
        shown = value if abs(value) < 10**20 else "a number of many digits"
        raise BadCheckpoint(
            f"the config.json of {source} says {name!r}: {shown}, which cannot be: at most {most} "
            "is expected"
        )


def largest(name: str) -> int:
    """The largest number that a setting of that name may be."""
    if name in _LAYERS:
        return MAX_LAYERS
    if name in _LENGTHS:
        return _MAX_LENGTH
    if name.endswith(_WIDTHS) or name.startswith("hidden"):
        return _MAX_WIDTH
    if (name.startswith(("num_", "n_")) or name.endswith(_COUNTS)) and "param" not in name:
        return _MAX_COUNT
    return _MAX_LENGTH if name.endswith("embeddings") else 1 << 63
