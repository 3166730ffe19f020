"""Checkpoints that several test modules of the zoo read; nobody writes to them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import builders
from zoo.adding.add import AddOptions, add
from zoo.manifest import Variant
from zoo.progress import Quiet

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gpt2", "gpt_neox")
Adder = Callable[..., Variant]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint of every family, and one with a tied head."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        getattr(builders, f"tiny_{family}")(folder / family)
    builders.tiny_llama(folder / "tied", seed=7, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="session")
def adapter(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for the tiny Llama."""
    return builders.tiny_lora(tmp_path_factory.mktemp("adapter"), checkpoints / "llama")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of a zoo that does not exist yet."""
    return tmp_path / "zoo"


@pytest.fixture
def put(root: Path) -> Adder:
    """Adds a source to `root`: put(name, source, base=..., replace=...)."""

    def put(name: str, source: Path | str, **options: object) -> Variant:
        return add(root, name, str(source), AddOptions(**options), Quiet())

    return put
