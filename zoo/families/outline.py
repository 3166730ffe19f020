"""A transformers model without weights, for architectures that have no file of their own here.

`Outline` finds its embeddings, layers, norm and head, and lets the model itself say what it would
hand its layers for rows at given positions (rotary tables, mostly). Attention goes wherever
`attending` points. Read by `zoo.families.trial`, which finds out what an architecture computes,
and by `workers.foreign`, which runs its layers.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from zoo.errors import UnsupportedFamily
from zoo.families.attending import register
from zoo.families.family import Config

# A model or a module of transformers: which attributes it has depends on the architecture.
Model: TypeAlias = Any
# What a layer returns: the hidden states, or a tuple that begins with them.
Output: TypeAlias = Any

# The widths of all layers together; the largest models known have a third of it.
_MAX_WIDTHS = 1 << 26


@dataclass(frozen=True, slots=True)
class Call:
    """What a model hands one of its layers beside the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Recorder: TypeAlias = Callable[[int, Tensor, Call], Output]


@dataclass(frozen=True, slots=True)
class Parts:
    """The paths of what a model has outside its layers; None: it has none."""

    tokens: str
    positions: str | None
    norm: str | None
    head: str


class EnoughSeen(Exception):
    """Raised out of a model's forward: what follows is of no interest."""


class Outline:
    """A model of this config without memory for its parameters: those of layers have no values,
    all others are zero; buffers are real, on `device`.

    `path` is where the model keeps its `layers`, `parts` what stands around them; `attention` is
    one of the names in `zoo.families.attending`. Raises UnsupportedFamily where the architecture
    has no such list or leaves no way into its attention."""

    def __init__(self, config: Config, attention: str, device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        kind = _model_class(config)
        self.name: str = config.model_type
        self.uses_registry = hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")
        if not self.uses_registry and not kind._supports_sdpa:
            raise UnsupportedFamily(
                f"models of type {self.name!r} are not supported: their attention is written out "
                "within their layers, and cannot run over pages"
            )
        register()
        with torch.device("meta"):
            self.model: Model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=attention if self.uses_registry else "sdpa",
            )
        self.model.eval().requires_grad_(False)
        self.path, self.layers = _layers(self.model, self.name, config.num_hidden_layers)
        self.parts = _parts(self.model, self.name, self.path)
        _check_widths(self.layers, self.name)
        _fill_buffers(self.model, device)
        _zero_outside(self.model, self.path, device)
        if not self.uses_registry:
            # The layers still call torch's attention; the model around them makes no masks for it.
            for index, layer in enumerate(self.layers):
                self.layers[index] = copy.deepcopy(layer)
            self.model.config._attn_implementation = attention
        self._returns_tuple = self._is_noting = False
        self._noted: list[Call] = []

    def layer(self, index: int) -> nn.Module:
        """A copy of a layer, for whoever fills it with weights."""
        made = copy.deepcopy(self.layers[index])
        made.__dict__.pop("forward", None)
        return made

    def record(self, recorder: Recorder) -> None:
        """Let every layer call recorder(index, hidden states, call) in place of its own forward."""

        def forward_of(index: int) -> Callable[..., Output]:
            return lambda hidden_states, *args, **kwargs: recorder(
                index, hidden_states, Call(args, kwargs)
            )

        self._is_noting = False
        for index, layer in enumerate(self.layers):
            layer.forward = forward_of(index)

    @torch.no_grad()
    def calls(self, positions: Tensor) -> list[Call]:
        """What the model hands each layer for rows at these positions, int64 [rows]."""
        if not self._is_noting:
            self.record(self._note)
            self._is_noting = True
        self._noted = found = []
        width = self.model.get_input_embeddings().weight.shape[1]
        x = torch.zeros(1, 1, width, device=positions.device).expand(1, len(positions), width)
        try:
            self.model.base_model(inputs_embeds=x, position_ids=positions[None], use_cache=False)
        except EnoughSeen:
            return found
        except (ValueError, TypeError, IndexError):
            if self._returns_tuple:
                raise
            self._returns_tuple = True
            return self.calls(positions)
        raise UnsupportedFamily(
            f"models of type {self.name!r} are not supported: they do not run every layer"
        )

    def _note(self, index: int, x: Tensor, call: Call) -> Output:
        self._noted.append(call)
        if index == len(self.layers) - 1:
            raise EnoughSeen
        return (x, None) if self._returns_tuple else x


def hidden_of(output: Output) -> Tensor:
    """The hidden states in what a layer returned."""
    return output[0] if isinstance(output, tuple) else output


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers within a layer, by their path."""
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def put(layer: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    """Set the module or the parameter at `path` within a layer."""
    parent, _, name = path.rpartition(".")
    if isinstance(value, Tensor):
        value = nn.Parameter(value, requires_grad=False)
    setattr(layer.get_submodule(parent), name, value)


def _model_class(config: Config) -> Model:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        raise UnsupportedFamily(
            f"models of type {config.model_type!r} are not supported: transformers has no causal "
            "language model of that type"
        )
    return kind


def _layers(model: nn.Module, name: str, count: int) -> tuple[str, nn.ModuleList]:
    """The one list of `count` layers within a model, and its path."""
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [p for p, _ in lists]
    found = [
        (path, module)
        for path, module in lists
        if len(module) == count and not any(path.startswith(f"{other}.") for other in outer)
    ]
    if len(found) != 1:
        raise UnsupportedFamily(
            f"models of type {name!r} are not supported: they do not have one list of {count} "
            "layers"
        )
    return found[0]


def _parts(model: Model, name: str, layers: str) -> Parts:
    """Embeddings, norm and head of a model; anything else with weights of its own is refused."""
    paths = {id(module): path for path, module in model.named_modules()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    positions: list[str] = []
    norms: list[str] = []
    for path, module in model.named_modules():
        if f"{path}.".startswith(f"{layers}.") or module in ends or list(module.children()):
            continue
        if isinstance(module, nn.Embedding):
            positions.append(path)
        elif list(module.parameters()) or "Norm" in type(module).__name__:
            norms.append(path)
    if None in ends or len(positions) > 1 or len(norms) > 1:
        raise UnsupportedFamily(
            f"models of type {name!r} are not supported: they have more around their layers than "
            "an embedding, learned positions, a norm and a head "
            f"({', '.join(positions + norms) or 'not even that'})"
        )
    tokens, head = (paths[id(module)] for module in ends)
    return Parts(tokens, positions[0] if positions else None, norms[0] if norms else None, head)


def _check_widths(layers: nn.Module, name: str) -> None:
    """Refuse what no model is before memory is spent on it."""
    widths = sum(max(parameter.shape, default=1) for parameter in layers.parameters())
    if widths > _MAX_WIDTHS:
        raise UnsupportedFamily(
            f"models of type {name!r} are not supported: they cannot be as wide as this config says"
        )


def _fill_buffers(model: Model, device: str) -> None:
    """Give buffers their values, as transformers does when it loads a checkpoint; one that it does
    not know stays NaN."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            value = math.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, value, device=device))
        module._is_hf_initialized = not list(module.buffers(recurse=False))
    model.initialize_weights()


def _zero_outside(model: nn.Module, layers: str, device: str) -> None:
    """Give what stands around the layers the value zero, so that the model can run up to them."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not name.startswith(f"{layers}."):
            put(model, name, torch.zeros((), device=device).expand(parameter.shape))
