"""The small files beside weights: config, tokenizer, chat template, licence; kept for serving and
export."""

from pathlib import Path

from zoo.errors import BadSource
from zoo.sources.inside import checked_place

MAX_FILE_BYTES = 128 << 20
_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".md", ".tiktoken"}
_NAMES = {"LICENSE", "NOTICE"}
_TOKENIZER = {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"}
_OF_MODEL = {"config.json", "generation_config.json"}


def read_side_files(folder: Path) -> dict[str, bytes]:
    """File name -> content of everything in the folder that is neither weights nor code."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name in _NAMES
        if not wanted or path.name.endswith(".index.json") or not path.is_file():
            continue
        size = checked_place(folder, path).stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadSource(f"{path} has {size} bytes, more than {MAX_FILE_BYTES}: remove it")
        files[path.name] = path.read_bytes()
    return files


def borrowed_names(own: set[str], base: set[str]) -> set[str]:
    """Which of the base's files a variant is served with: those it lacks, but no tokenizer file
    if it brings a tokenizer of its own (the two must not be mixed), and never the base's
    documents."""
    usable = {name for name in base if name not in _NAMES and not name.endswith(".md")}
    if own & _TOKENIZER:
        usable &= _OF_MODEL
    if "config.json" in own:
        usable -= _OF_MODEL
    return usable - own
