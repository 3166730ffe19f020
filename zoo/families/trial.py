"""What the layers of an architecture of transformers compute, found out by running them once.

A model is built without weights; small random stand-ins take the place of its linear layers, its
attention and its tables, so that a trial of the largest model takes seconds and megabytes. What
goes in and comes out says all that a chain's specs need, and whatever serving could not do alike
is refused here, in one sentence.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from zoo.errors import UnsupportedFamily
from zoo.families.attending import SERVED, TRIED, attending
from zoo.families.family import Config, Shapes
from zoo.families.heads import Heads, Listener
from zoo.families.masks import Masks
from zoo.families.outline import (
    Call,
    EnoughSeen,
    Model,
    Outline,
    Output,
    hidden_of,
    linears_of,
    put,
)

# Rows of a trial, and tokens of the table that stands in for the embedding.
ROWS, TOKENS = 7, 32

_LENGTH_BOUND = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's attention, the paths of its linear layers, the shape of every parameter."""

    heads: Heads
    linears: tuple[str, ...]
    shapes: Shapes


@dataclass(eq=False, slots=True)
class Run:
    """One run of a model: what left its last layer, the logits, and what every layer was handed
    beside its rows."""

    last: Tensor
    logits: Tensor
    calls: list[Call]


class Trial:
    """A config, tried: `layers` are what its layers are, `outside` the shapes of the other
    parameters, `shown` is a run of the model on stand-ins. Raises UnsupportedFamily."""

    def __init__(self, config: Config) -> None:
        self.outline = Outline(config, TRIED)
        self.random = torch.Generator().manual_seed(0)
        self._masks = Masks(config.max_position_embeddings)
        self._listener = Listener(self._masks, self.refuse)
        self._served = Outline(config, SERVED)
        self._refuse_length_bound()
        prepared = [self._prepare(layer) for layer in self.outline.layers]
        self.outside = self._fill_outside()
        self._forwards = [layer.forward for layer in self.outline.layers]
        self.shown = self._check_rows()
        self._check_positions()
        self.layers = [
            Layer(heads, linears, shapes)
            for heads, (linears, shapes) in zip(self._listener.heard, prepared, strict=True)
        ]

    def refuse(self, reason: str) -> NoReturn:
        """Raise UnsupportedFamily: `reason` says what such models do."""
        raise UnsupportedFamily(
            f"models of type {self.outline.name!r} are not supported: they {reason}"
        )

    def module(self, path: str | None) -> Model:
        """A module of the model."""
        return self.outline.model.get_submodule(path)

    def tensor(self, *size: int) -> Tensor:
        """Random numbers."""
        return torch.randn(size, generator=self.random)

    @torch.no_grad()
    def embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first layer gets: [rows, hidden]; tokens below TOKENS."""
        found: list[Tensor] = []

        def recorder(_index: int, x: Tensor, _call: Call) -> Output:
            found.append(x[0])
            raise EnoughSeen

        self.outline.record(recorder)
        with self._masks.made(), suppress(EnoughSeen):
            self.outline.model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            )
        return found[0]

    @torch.no_grad()
    def _run(self, tokens: Tensor, first: int = 0) -> Run:
        """Run the model over tokens, the first of which stands at position `first`."""
        calls: list[Call] = []
        passed: list[Tensor] = []

        def recorder(index: int, x: Tensor, call: Call) -> Output:
            if index != len(calls) or (passed and x is not passed[-1]):
                self.refuse("change what passes from layer to layer")
            calls.append(call)
            output = self._forwards[index](x, *call.args, **call.kwargs)
            passed.append(hidden_of(output))
            return output

        self.outline.record(recorder)
        self._listener.heard.clear()
        positions = torch.arange(first, first + ROWS)[None]
        with self._masks.made(), attending(self._listener.attend, self.outline.uses_registry):
            logits = self.outline.model(
                input_ids=tokens[None], position_ids=positions, use_cache=False
            ).logits
        if not len(calls) == len(self._listener.heard) == len(self._forwards):
            self.refuse(
                f"attend {len(self._listener.heard)} times in {len(self._forwards)} layers, and "
                "only layers of one causal attention each can run over pages"
            )
        return Run(passed[-1], logits, calls)

    # ---- stand-ins ------------------------------------------------------------------------------

    def _prepare(self, layer: nn.Module) -> tuple[tuple[str, ...], Shapes]:
        """Put stand-ins into a layer; the paths of its linears and its parameters' shapes."""
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        buffers = [name for name in layer.state_dict() if name not in shapes]
        if buffers:
            self.refuse(f"keep buffers ({buffers[0]!r}) in their checkpoints")
        linears = linears_of(layer)
        for path, linear in linears.items():
            self._check_plain(linear)
            put(layer, path, _StandIn(self, path, linear))
        for name, parameter in list(layer.named_parameters()):
            if parameter.dim() > 2:
                self.refuse(
                    f"keep {name!r} of shape {list(parameter.shape)} outside any linear layer, as "
                    "experts and convolutions are kept"
                )
            put(layer, name, 1 + 0.1 * self.tensor(*parameter.shape))
        return tuple(linears), shapes

    def _fill_outside(self) -> Mapping[str, tuple[int, ...]]:
        """Put small tables and random norms around the layers; the shapes that were there."""
        parts, inside = self.outline.parts, f"{self.outline.path}."
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self.outline.model.named_parameters(remove_duplicate=False):
            if not name.startswith(inside):
                shapes[name] = tuple(parameter.shape)
        tables = tuple(f"{path}." for path in (parts.tokens, parts.positions, parts.head) if path)
        for name, shape in shapes.items():
            if name.startswith(tables):
                put(self.outline.model, name, self.tensor(TOKENS, *shape[1:]))
            else:
                put(self.outline.model, name, 1 + 0.1 * self.tensor(*shape))
        self.module(parts.tokens).padding_idx = None
        return shapes

    # ---- checks ---------------------------------------------------------------------------------

    def _refuse_length_bound(self) -> None:
        """Rotary positions that change with the length of the sequence cannot be told row by
        row."""
        for module in self.outline.model.modules():
            kinds = getattr(module, "rope_type", None)
            found = set(kinds.values() if isinstance(kinds, dict) else [kinds]) & _LENGTH_BOUND
            if found:
                self.refuse(
                    f"have rotary positions of type {found.pop()!r}, which depend on the length of "
                    "the sequence"
                )

    def _check_plain(self, linear: nn.Linear) -> None:
        """Linear layers of a class of their own must still be linear layers."""
        if type(linear) is nn.Linear:
            return
        kept = linear.weight, linear.bias
        x, weight, bias = self.tensor(2, 5), self.tensor(3, 5), self.tensor(3)
        put(linear, "weight", weight)
        put(linear, "bias", bias)
        y, expected = linear(x), nn.functional.linear(x, weight, bias)
        if not isinstance(y, Tensor) or not torch.allclose(y, expected, atol=1e-6):
            self.refuse(f"have linear layers ({type(linear).__name__}) that do more than multiply")
        linear.weight, linear.bias = kept

    def _check_rows(self) -> Run:
        """Beside attention no row touches another, and layers are told nothing of the tokens."""
        tokens = torch.arange(ROWS) + 3
        before = self._run(tokens)
        changed = 3
        tokens[changed] = TOKENS - 1
        after = self._run(tokens)
        for ours, theirs in zip(before.calls, after.calls, strict=True):
            if not _equal(self._told(ours), self._told(theirs)):
                self.refuse("tell their layers more than where rows stand")
        others = [row for row in range(ROWS) if row != changed]
        if not torch.equal(before.logits[:, others], after.logits[:, others]):
            self.refuse("mix rows outside their attention, as convolutions and states do")
        shift = 2
        moved = self._run(tokens.roll(-shift), first=shift)
        if not torch.allclose(moved.logits[:, :-shift], after.logits[:, shift:], atol=1e-4):
            self.refuse("count the rows of a batch where they should look at positions")
        if len({(h.kv_heads, h.head_dim) for h in self._listener.heard}) > 1:
            self.refuse("have layers with keys and values of several shapes")
        return before

    def _check_positions(self) -> None:
        """What layers are told depends, row by row, on the row's own position."""
        near = self._served.calls(torch.arange(ROWS))
        spread = torch.tensor([self._masks.context - 1, 5, 3, 0, 6, 2, 2])
        far = self._served.calls(spread)
        rows = torch.arange(1, ROWS)
        for tried, ours, theirs in zip(self.shown.calls, near, far, strict=True):
            if not _equal(self._told(tried), self._told(ours)):
                self.refuse("tell their layers more than where rows stand")
            expected = [_rows(told, spread[1:]) for told in self._told(ours)]
            if not _equal(expected, [_rows(told, rows) for told in self._told(theirs)]):
                self.refuse("tell a row something that depends on the positions of others")

    def _told(self, call: Call) -> list[Tensor]:
        """The tensors that a layer is handed, but for masks."""
        found: list[Tensor] = []
        todo: list[object] = [*call.args, *call.kwargs.values()]
        while todo:
            value = todo.pop()
            if isinstance(value, Tensor) and not self._masks.knows(value):
                found.append(value)
            elif isinstance(value, tuple | list):
                todo.extend(value)
            elif isinstance(value, dict):
                todo.extend(value.values())
        return found


class _StandIn(nn.Module):
    """In place of a linear layer: picks and weighs elements of each row. `weight` says the data
    type alone."""

    def __init__(self, trial: Trial, path: str, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.empty(0)
        self._refuse, self._path = trial.refuse, path
        size = (linear.out_features,)
        self._picked = torch.randint(linear.in_features, size, generator=trial.random)
        self._weights = trial.tensor(*size)
        self.bias = trial.tensor(*size) if "bias" in linear.state_dict() else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1].numel() != ROWS:
            self._refuse(f"run {self._path!r} on some rows only, as mixtures of experts do")
        y = x.index_select(-1, self._picked) * self._weights
        return y if self.bias is None else y + self.bias


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _rows(told: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor along the axis that has one element per row, if there is one."""
    axes = [axis for axis, size in enumerate(told.shape) if size == ROWS]
    return told.index_select(axes[0], rows) if axes else told
