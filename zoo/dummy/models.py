"""Whole models without weights: the checkpoints that a config describes, with a key in place of the
bytes of each tensor."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zoo.dummy.recipe import BASE, DTYPES, Recipe
from zoo.errors import UnsupportedOption
from zoo.families.family import HEAD, Design, Family, Place
from zoo.sources.checkpoint import Checkpoint, read_config, read_eos
from zoo.sources.weights import SourceTensor

# Name of a tensor -> the variant whose own it is.
Owner = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Models:
    """The checkpoints of one recipe, all of one shape. Raises a ZooError where none can be."""

    recipe: Recipe
    family: Family
    design: Design
    config: bytes

    def base(self) -> Checkpoint:
        """The model that the others stand upon."""
        return self._checkpoint(lambda _: BASE)

    def full(self, name: str) -> Checkpoint:
        """Every tensor its own."""
        return self._checkpoint(lambda _: name)

    def last(self, name: str) -> Checkpoint:
        """The last layers its own, the rest the base's."""
        layers = len(self.design.layers)
        if self.recipe.last_layers > layers:
            raise UnsupportedOption(
                f"--last-layers {self.recipe.last_layers} are more than the {layers} that "
                f"{self.recipe.config} has"
            )
        width = len(self.family.layer_units)
        first = 1 + width * (layers - self.recipe.last_layers)
        own = range(first, 1 + width * layers)

        def owner(tensor: str) -> str:
            place = self.family.tensor(tensor, layers)
            return name if place is not None and place.unit in own else BASE

        return self._checkpoint(owner)

    def tensor(self, owner: str, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """A tensor of a variant; what tells it from all others stands for its bytes."""
        key = hashlib.sha256(f"{self.recipe.seed} {owner} {name}".encode()).digest()
        return SourceTensor(DTYPES[self.recipe.dtype], shape, memoryview(key))

    def _checkpoint(self, owner: Owner) -> Checkpoint:
        files = {"config.json": self.config}
        tensors = {
            name: self.tensor(owner(name), name, shape) for name, shape in self._shapes().items()
        }
        source = f"dummy:{self.recipe.config}"
        return Checkpoint(source, self.family, self.design, tensors, files, read_eos(files))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint of this config, under its own names."""
        layers = len(self.design.layers)
        return {
            self.family.tensor_name(Place(unit, role), layers): shape
            for unit, shapes in enumerate(self.family.shapes(self.design))
            for role, shape in shapes.items()
            if not (self.design.tied and role == HEAD)
        }


def read_models(recipe: Recipe) -> Models:
    """The models of a recipe, its config read as that of a real checkpoint is. Raises a
    ZooError."""
    recipe.check()
    config = recipe.config_json()
    with tempfile.TemporaryDirectory(prefix="blockllm-dummy-") as scratch:
        Path(scratch, "config.json").write_bytes(config)
        family, design = read_config(Path(scratch), recipe.config)
    return Models(recipe, family, design, config)
