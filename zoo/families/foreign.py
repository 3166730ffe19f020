"""Any other decoder-only architecture of transformers: its layers run through transformers' own
classes, with our linear layers and our attention over pages.

The tables of such a family are read off the model itself, and its specs come from a trial of it
(`zoo.families.trial`), so there is nothing to write for a new one. A layer is one unit; its roles
are the names of its parameters.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from zoo.errors import UnsupportedFamily, ZooError
from zoo.families.family import Config, Design, Family, Place
from zoo.manifest import EmbedSpec, ForeignSpec, HeadSpec

if TYPE_CHECKING:
    from zoo.families.edges import Edges
    from zoo.families.outline import Outline
    from zoo.families.trial import Trial

_MAX_CONTEXT = 1 << 26


@dataclass(frozen=True, slots=True)
class ForeignFamily(Family):
    """A family whose layers keep transformers' names for everything within them."""

    def module(self, path: str, num_layers: int) -> Place | None:
        return self._within(path, num_layers) or Family.module(self, path, num_layers)

    def tensor(self, name: str, num_layers: int) -> Place | None:
        return self._within(name, num_layers) or Family.tensor(self, name, num_layers)

    def tensor_name(self, place: Place, num_layers: int) -> str:
        if place.unit in (0, 1 + num_layers):
            return Family.tensor_name(self, place, num_layers)
        return f"{self.prefix}{self.layer}{place.unit - 1}.{place.role}"

    def _within(self, path: str, num_layers: int) -> Place | None:
        """The place of what stands within a layer."""
        name = path.removeprefix(self.prefix)
        match = re.fullmatch(re.escape(self.layer) + r"(0|[1-9]\d{0,5})\.(.+)", name)
        if match is None or int(match[1]) >= num_layers:
            return None
        return Place(1 + int(match[1]), match[2])


@cache
def foreign_family(model_type: str) -> ForeignFamily:
    """The family of a model type that transformers knows; raises UnsupportedFamily."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UnsupportedFamily(
            f"models of type {model_type!r} are not supported: the transformers installed here "
            "does not know them, and code that comes with a model is never run"
        )
    try:
        config = CONFIG_MAPPING[model_type]()
        _check_config(config)
        return _laid_out(_outline(config))
    except ZooError:
        raise
    except Exception as error:
        # what a class of transformers cannot build, it refuses with errors of many types
        raise _refused(model_type, f"cannot be built for serving: {_line(error)}") from error


def design(config: Config) -> Design:
    """A config of transformers, tried."""
    from zoo.families.edges import edges_of
    from zoo.families.trial import Trial

    _check_config(config)
    try:
        trial = Trial(config)
        edges = edges_of(trial, config)
    except ZooError:
        raise
    except Exception as error:
        # whatever a model cannot do on stand-ins, it could not do in a worker either
        raise _refused(config.model_type, f"fail when tried: {_line(error)}") from error
    return _designed(config, trial, edges)


def _check_config(config: Config) -> None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise _refused(config.model_type, "have an encoder beside their decoder")
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or not 1 < context <= _MAX_CONTEXT:
        raise _refused(
            config.model_type, "say no sensible longest sequence (max_position_embeddings)"
        )


def _outline(config: Config) -> "Outline":
    from zoo.families.attending import SERVED
    from zoo.families.outline import Outline

    return Outline(config, SERVED)


def _laid_out(outline: "Outline") -> ForeignFamily:
    """Where a model keeps what, as a family says it."""
    parts = outline.parts
    parent, _, layers = outline.path.rpartition(".")
    prefix = f"{parent}." if parent else ""
    weighty = {name.rpartition(".")[0] for name, _ in outline.model.named_parameters()}
    embed = {"tokens": parts.tokens, "positions": parts.positions}
    head = {"norm": parts.norm if parts.norm in weighty else None, "head": parts.head}
    present = [path for path in (*embed.values(), *head.values()) if path]
    return ForeignFamily(
        name=outline.name,
        model_types=(outline.name,),
        design=design,
        embed={role: path.removeprefix(prefix) for role, path in embed.items() if path},
        attention={},
        mlp={},
        head={role: path.removeprefix(prefix) for role, path in head.items() if path},
        prefix=prefix,
        layer=f"{layers}.",
        outside=tuple(path for path in present if not path.startswith(prefix)),
        ignored=("*.inv_freq", "inv_freq"),
        parallel=True,
    )


def _designed(config: Config, trial: "Trial", edges: "Edges") -> Design:
    """What a trial and its edges say, as specs."""
    from zoo.families.canonical import canonical_config

    parts, shapes = trial.outline.parts, trial.outside
    said = canonical_config(config)
    vocabulary, hidden = shapes[f"{parts.tokens}.weight"]
    layers = tuple(
        ForeignSpec(
            hidden=hidden,
            heads=layer.heads.heads,
            kv_heads=layer.heads.kv_heads,
            head_dim=layer.heads.head_dim,
            scale=layer.heads.scale,
            config=said,
            layer=index,
            linears=layer.linears,
            window=layer.heads.window,
            copies=layer.heads.copies,
        )
        for index, layer in enumerate(trial.layers)
    )
    biased = {"norm": f"{parts.norm}.bias", "head": f"{parts.head}.bias"}
    head = shapes[f"{parts.head}.weight"][0]
    positions = shapes.get(f"{parts.positions}.weight", (0,))[0]
    context = config.max_position_embeddings
    if positions:
        context = min(context, positions - edges.offset)
    return Design(
        embed=EmbedSpec(hidden, vocabulary, edges.scale, edges.offset),
        layers=tuple((spec,) for spec in layers),
        head=HeadSpec(hidden, head, edges.norm, edges.head_scale),
        biased=frozenset(role for role, name in biased.items() if name in shapes),
        tied=f"{parts.head}.weight" in trial.outline.model.all_tied_weights_keys,
        context=context,
        positions=positions,
        layer_shapes=tuple(layer.shapes for layer in trial.layers),
    )


def _refused(model_type: str, reason: str) -> UnsupportedFamily:
    return UnsupportedFamily(f"models of type {model_type!r} are not supported: they {reason}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
