"""A zoo with a tiny base and variants of every kind that is served, and their references."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests import builders
from zoo.adding.add import AddOptions, add
from zoo.progress import Quiet

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Attention and MLP of the families whose q, k and v are one matrix.
FUSED = {
    "phi3": (("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "gpt2": (("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
    "gpt_neox": (("query_key_value", "attention.dense"), ("dense_h_to_4h", "dense_4h_to_h")),
}


class Family:
    """`zoo` holds the variants; `reference(name)` is the model that peft and transformers make."""

    def __init__(self, root: Path, family: str, **config: object) -> None:
        self.root = root
        self.zoo = root / "zoo"
        self.base = getattr(builders, f"tiny_{family}")(root / "base", **config)
        self._adapters: dict[str, Path] = {}
        self._full: dict[str, Path] = {"base": self.base}
        add(self.zoo, "base", str(self.base), AddOptions(), Quiet())

    def lora(self, name: str, **config: object) -> None:
        path = builders.tiny_lora(self.root / name, self.base, **config)
        self._adapters[name] = path
        add(self.zoo, name, str(path), AddOptions(base="base"), Quiet())

    def tune(self, name: str, tensors: Sequence[str], seed: int = 1) -> None:
        path = builders.fine_tune(self.root / name, self.base, tensors, seed)
        self._full[name] = path
        add(self.zoo, name, str(path), AddOptions(base="base"), Quiet())

    @property
    def names(self) -> list[str]:
        return [*self._full, *self._adapters]

    def reference(self, name: str) -> torch.nn.Module:
        if name in self._full:
            return AutoModelForCausalLM.from_pretrained(
                self._full[name], dtype=torch.float32
            ).eval()
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return PeftModel.from_pretrained(base, self._adapters[name]).eval()


def mixed(root: Path) -> Family:
    """A Llama with two LoRA of different targets and ranks, and one whose last layer was tuned."""
    made = Family(root, "llama")
    made.lora("qv", rank=4, targets=["q_proj", "v_proj"])
    made.lora("mlp", rank=20, targets=MLP, seed=3)
    made.tune("last", ["layers.3."])
    return made


def everything(root: Path, family: str) -> Family:
    """Base, LoRA of several ranks and targets, last layers, all layers."""
    made = Family(root, family)
    if family in FUSED:
        attention, mlp = FUSED[family]
        layers, transposed = ("h.", True) if family == "gpt2" else ("layers.", False)
        made.lora("attn", rank=4, targets=attention, fan_in_fan_out=transposed)
        made.lora("mlp", rank=8, targets=mlp, seed=2, fan_in_fan_out=transposed)
        made.lora("all", rank=3, targets=attention + mlp, seed=4, fan_in_fan_out=transposed)
        made.tune("last", [f"{layers}3."])
        made.tune("full", [layers, "wte", "embed"], seed=3)
        return made
    made.lora("qv", rank=4, targets=["q_proj", "v_proj"])
    made.lora("all", rank=16, alpha=16, targets=[*ATTENTION, *MLP], seed=2, use_rslora=True)
    made.lora("mlp", rank=2, targets=MLP, seed=3, dtype=torch.bfloat16)
    made.lora("upper", rank=8, targets=["q_proj"], seed=4, layers_to_transform=[2, 3])
    made.lora("saved", rank=3, targets=["v_proj"], seed=5, modules_to_save=["lm_head"])
    made.tune("last", ["layers.3."])
    made.tune("last2", ["layers.2.", "layers.3."], seed=7)
    made.tune("full", ["layers.", "embed", "norm"], seed=3)
    return made


def wrong_tokens(
    model: torch.nn.Module, prompt: Sequence[int], tokens: Sequence[int], tie: float = 1e-3
) -> tuple[int, int]:
    """Greedy tokens that differ from the model's own choice: (really, at near ties).

    Every position is judged after the tokens actually emitted, so one near tie does not spread."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
    wrong = ties = 0
    for position, token in enumerate(tokens, len(prompt) - 1):
        best = logits[position].max()
        gap = float(best - logits[position, token])
        if gap > 0:
            wrong, ties = (wrong, ties + 1) if gap < tie else (wrong + 1, ties)
    return wrong, ties
