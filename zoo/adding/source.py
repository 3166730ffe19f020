"""What `add` was given: a transformers folder, a PEFT folder, a `.gguf` file, a hub id, or a sum
of variants."""

from pathlib import Path

from zoo.adapters.adapter import Adapter, is_adapter, read_adapter
from zoo.adding.weighted import Sum, read_sum
from zoo.errors import BadSource
from zoo.sources.checkpoint import Checkpoint, read_checkpoint
from zoo.sources.hub import download, is_hub_id

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def read_source(source: str, dtype: str) -> Checkpoint | Adapter | Sum:
    """Read a source of any kind; `dtype` is what a `.gguf` is stored as. Raises a ZooError."""
    path = Path(source).expanduser()
    asked = read_sum(source)
    if asked is not None:
        return asked
    if path.is_dir():
        return _read_folder(path, str(path.resolve()))
    if path.is_file():
        return _read_file(path, dtype)
    if is_hub_id(source):
        return _read_folder(download(source), source)
    raise BadSource(
        f"{source!r} is neither a folder, a .gguf file, nor a hub id (owner/name): nothing is there"
    )


def _read_folder(folder: Path, source: str) -> Checkpoint | Adapter:
    if is_adapter(folder):
        return read_adapter(folder, source)
    if (folder / "config.json").is_file():
        return read_checkpoint(folder, source)
    packed = sorted(folder.glob("*.gguf"))
    if packed:
        raise BadSource(f"{source} holds .gguf files: give the path of one, such as {packed[0]}")
    raise BadSource(f"{source} holds neither a config.json (a model) nor an adapter_config.json")


def _read_file(path: Path, dtype: str) -> Checkpoint:
    if path.suffix == ".gguf":
        from zoo.sources.gguf import read_gguf

        return read_gguf(path.resolve(), dtype)
    if path.suffix in _PICKLES:
        raise BadSource(
            f"{path} is a pickle file, which can run code when it is read: it is refused"
        )
    raise BadSource(f"{path} is a file: give the folder it lies in, or a .gguf file")
