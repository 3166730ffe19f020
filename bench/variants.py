"""Random fine-tunes of a real checkpoint: what it costs to serve them does not depend on whether
their weights mean anything.

Each function writes a folder that `zoo.adding.add` takes; equal seeds give equal files.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NOISE = 0.01


class Checkpoint:
    """A transformers folder whose tensors lie in memory-mapped safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {
            name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)
        }
        self.config = json.loads((folder / "config.json").read_text())

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return self.config["num_hidden_layers"]

    def names(self, parts: Sequence[str]) -> list[str]:
        """Matrices whose names contain one of `parts`."""
        return [name for name in self._files if any(part in name for part in parts)]

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: self.tensor(name) for name in self._files}


def lora(base: Checkpoint, target: Path, *, rank: int, seed: int) -> Path:
    """A LoRA adapter on every projection of every layer, small random A and B."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in base.names([f"{projection}.weight" for projection in PROJECTIONS]):
        out, width = base.tensor(name).shape
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=draw) / width**0.5
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * _NOISE
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def last_layers(base: Checkpoint, target: Path, *, layers: int, seed: int) -> Path:
    """A fine-tune of the last `layers` layers."""
    first = base.num_layers - layers
    parts = tuple(f".layers.{index}." for index in range(first, base.num_layers))
    return _tuned(base, target, seed, lambda name: any(part in name for part in parts))


def full(base: Checkpoint, target: Path, *, seed: int) -> Path:
    """A fine-tune of every tensor."""
    return _tuned(base, target, seed, lambda name: True)


def as_granite(base: Checkpoint, target: Path) -> Path:
    """The weights of a Llama as a Granite that multiplies by 1 everywhere: the same function, as
    an architecture of transformers' that we have no file for."""
    shutil.copytree(base.folder, target)
    config = base.config
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    changed = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": head**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    (target / "config.json").write_text(json.dumps(config | changed))
    return target


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Give every trainable parameter small random values: fresh adapters start without effect.
    Whole modules are copies of the base's, and are moved by as much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(parameter + drawn if "modules_to_save" in name else drawn)


def _tuned(base: Checkpoint, target: Path, seed: int, is_tuned: Callable[[str], bool]) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = base.tensors()
    for name, tensor in tensors.items():
        if is_tuned(name):
            scale = _NOISE * float(tensor.float().std())
            noise = torch.randn(tensor.shape, generator=draw) * scale
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    shutil.copytree(base.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())
