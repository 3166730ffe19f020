"""What peft, or the `adapters` library, computes with an adapter that `bench.adapters` made: the
reference."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.activations import get_activation

from bench.adapters import names_of


def load(base: Path, adapter: Path) -> torch.nn.Module:
    """The checkpoint at `base` with an adapter on it."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    if "peft_type" not in settings:
        return _with_bottlenecks(base, adapter, settings["config"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def _with_bottlenecks(base: Path, adapter: Path, config: dict[str, Any]) -> torch.nn.Module:
    """The library's own lines, on transformers' model: `x` is the stream, `y` what a half-layer
    adds to it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors = load_file(adapter / "adapter.safetensors")
    act = get_activation(config["non_linearity"])
    names = names_of(base)
    for layer in range(model.config.num_hidden_layers):
        for half, (norm, module) in names.halves.items():
            start = f"{names.layers}{layer}.{half}_adapters.adapters.a."
            parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if not parts:
                continue
            seen: list[torch.Tensor] = []

            def see(_: Any, given: Any, seen: list[torch.Tensor] = seen) -> None:
                seen[:] = [given[0]]

            def change(
                _: Any,
                __: Any,
                given: Any,
                seen: list[torch.Tensor] = seen,
                parts: dict[str, torch.Tensor] = parts,
            ) -> Any:
                (x,), y = seen, given[0] if isinstance(given, tuple) else given
                z = x if config["is_parallel"] else y + x if config["original_ln_before"] else y
                down = act(z @ parts["adapter_down.0.weight"].T + parts["adapter_down.0.bias"])
                up = down @ parts["adapter_up.weight"].T + parts["adapter_up.bias"]
                y = y + up * parts.get("scaling", config["scaling"])
                return (y, *given[1:]) if isinstance(given, tuple) else y

            model.get_submodule(f"{names.layers}{layer}.{norm}").register_forward_pre_hook(see)
            model.get_submodule(f"{names.layers}{layer}.{module}").register_forward_hook(change)
    return model
