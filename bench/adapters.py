"""Small adapters of every kind, made by peft itself, random but seeded; bottlenecks as the
`adapters` library saves them.

`KINDS` names each kind of tuning; `make(kind, path, base)` saves one for the checkpoint at `base`
into `path`. Modules are named as in Llama or GPT-2, whichever the base is. `MERGED` are types of
peft that no piece can say.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bench.variants import randomize

HEAD_FILE = "model_head.safetensors"
_CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Names:
    """What a family calls its modules."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    keys: tuple[str, ...]
    down: str
    norm: str
    tokens: str
    conv: bool
    layers: str
    halves: Mapping[str, tuple[str, str]]

    @property
    def every(self) -> list[str]:
        return [*self.attention, *self.mlp]


LLAMA = Names(
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    keys=("k_proj", "v_proj"),
    down="down_proj",
    norm="input_layernorm",
    tokens="embed_tokens",
    conv=False,
    layers="model.layers.",
    halves={
        "attention": ("input_layernorm", "self_attn"),
        "output": ("post_attention_layernorm", "mlp"),
    },
)
GPT2 = Names(
    attention=("c_attn", "attn.c_proj"),
    mlp=("c_fc", "mlp.c_proj"),
    keys=("c_attn",),
    down="mlp.c_proj",
    norm="ln_1",
    tokens="wte",
    conv=True,
    layers="transformer.h.",
    halves={"attention": ("ln_1", "attn"), "output": ("ln_2", "mlp")},
)


def _lora(names: Names, **settings: object) -> peft.PeftConfig:
    plain = {"r": 4, "lora_alpha": 8, "target_modules": names.every, "fan_in_fan_out": names.conv}
    chosen: dict[str, Any] = plain | settings
    return peft.LoraConfig(**_CAUSAL, **chosen)


def _ia3(names: Names, **settings: object) -> peft.PeftConfig:
    targets = [*names.keys, names.down]
    plain = {"target_modules": targets, "feedforward_modules": [names.down]}
    chosen: dict[str, Any] = plain | settings
    return peft.IA3Config(**_CAUSAL, fan_in_fan_out=names.conv, **chosen)


def _patterns(names: Names) -> peft.PeftConfig:
    return _lora(
        names,
        rank_pattern={rf"layers.1.*{names.attention[0]}": 2, names.mlp[0]: 5},
        alpha_pattern={names.down: 1},
    )


# Kind -> settings. The name before ":" is what the zoo calls such a variant.
KINDS: dict[str, Callable[[Names], peft.PeftConfig]] = {
    "lora": _lora,
    "lora:patterns": _patterns,
    "lora:rank-stabilized": lambda n: _lora(n, use_rslora=True, r=6),
    "lora:some layers": lambda n: _lora(n, layers_to_transform=[1, 3]),
    "lora:biases inside": lambda n: _lora(n, lora_bias=True),
    "lora:biases beside": lambda n: _lora(n, bias="all" if n.conv else "none"),
    "lora:embedding and head": lambda n: _lora(
        n, target_modules=[n.attention[0], n.tokens, "lm_head"]
    ),
    "lora:whole modules": lambda n: _lora(
        n, target_modules=[n.attention[0]], modules_to_save=[n.norm, "lm_head"]
    ),
    "lora:whole embedding": lambda n: _lora(n, target_modules=[n.down], modules_to_save=[n.tokens]),
    "lora:tokens": lambda n: _lora(n, trainable_token_indices=[7, 2, 300]),
    "dora": lambda n: _lora(n, use_dora=True),
    "dora:embedding and head": lambda n: _lora(
        n, use_dora=True, target_modules=[n.attention[0], n.tokens, "lm_head"]
    ),
    "ia3": _ia3,
    "ia3:everywhere": lambda n: _ia3(n, target_modules=n.every),
    "ia3:inputs": lambda n: _ia3(n, target_modules=n.every, feedforward_modules=n.every),
    "prefix": lambda n: peft.PrefixTuningConfig(**_CAUSAL, num_virtual_tokens=5),
    "prefix:projected": lambda n: peft.PrefixTuningConfig(
        **_CAUSAL, num_virtual_tokens=19, prefix_projection=True, encoder_hidden_size=24
    ),
    "prompt": lambda n: peft.PromptTuningConfig(**_CAUSAL, num_virtual_tokens=3),
    "prompt:encoded": lambda n: peft.PromptEncoderConfig(
        **_CAUSAL, num_virtual_tokens=17, encoder_hidden_size=24
    ),
    "prompt:in context": lambda n: peft.CPTConfig(
        **_CAUSAL, cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
    ),
    "tokens": lambda n: peft.TrainableTokensConfig(
        **_CAUSAL, token_indices=[9, 3, 250], target_modules=[n.tokens]
    ),
    "norm": lambda n: peft.LNTuningConfig(**_CAUSAL),
}

MERGED: dict[str, Callable[[Names], peft.PeftConfig]] = {
    "lora:pissa": lambda n: _lora(n, init_lora_weights="pissa"),
    "lora:parameters": lambda n: _lora(
        n, target_modules=[], target_parameters=[f"{n.attention[0]}.weight"]
    ),
    "vera": lambda n: peft.VeraConfig(**_CAUSAL, r=4, target_modules=[n.attention[0]]),
    "oft": lambda n: peft.OFTConfig(
        **_CAUSAL, r=0, oft_block_size=8, target_modules=[n.attention[0]]
    ),
    "adalora": lambda n: peft.AdaLoraConfig(
        **_CAUSAL, init_r=4, target_r=2, total_step=10, target_modules=[n.attention[0]]
    ),
    "c3a": lambda n: peft.C3AConfig(**_CAUSAL, block_size=32, target_modules=[n.attention[0]]),
    "vblora": lambda n: peft.VBLoRAConfig(
        **_CAUSAL, r=2, num_vectors=8, vector_length=16, target_modules=[n.attention[0]]
    ),
    "shira": lambda n: peft.ShiraConfig(**_CAUSAL, r=2, target_modules=[n.attention[0]]),
}


# Kind -> settings of the `adapters` library, as far as they differ from `SERIAL`.
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "bottleneck": {},
    "bottleneck:both halves": {"mh_adapter": True, "original_ln_before": False},
    "bottleneck:parallel": {"is_parallel": True, "non_linearity": "relu", "scaling": 4.0},
    "bottleneck:scaled": {"mh_adapter": True, "scaling": "channel", "non_linearity": "gelu_new"},
}
SERIAL = {
    "mh_adapter": False,
    "output_adapter": True,
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "non_linearity": "swish",
    "is_parallel": False,
    "scaling": 1.0,
    "reduction_factor": 16,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "phm_layer": False,
    "inv_adapter": None,
}
BOTTLENECK_SIZE = 6


def names_of(base: Path) -> Names:
    """The names of the checkpoint's family."""
    kind = json.loads((base / "config.json").read_text())["model_type"]
    return GPT2 if kind == "gpt2" else LLAMA


def make(kind: str, path: Path, base: Path, seed: int = 0) -> Path:
    """Save an adapter of that kind for the checkpoint at `base`."""
    if kind in BOTTLENECKS:
        return bottleneck(path, base, seed, **BOTTLENECKS[kind])
    config = (KINDS | MERGED)[kind](names_of(base))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft speaks of training, and asks the hub about the base.
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        if kind.startswith("ia3") or kind == "norm":
            _nudge(tuned, seed)
        else:
            randomize(tuned, seed)
        tuned.save_pretrained(str(path))
    return path


def _nudge(model: torch.nn.Module, seed: int) -> None:
    """Move factors and norms, which start at 1 or at the base's own, a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def bottleneck(path: Path, base: Path, seed: int = 0, **changes: object) -> Path:
    """Save what the `adapters` library saves for a bottleneck adapter of these settings."""
    config: dict[str, Any] = SERIAL | changes
    settings = {"config": config, "model_type": "tiny", "name": "a", "version": "1"}
    model = AutoModelForCausalLM.from_pretrained(base)
    wide, layers = model.config.hidden_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    # Small enough that what a parallel one adds does not grow from layer to layer.
    size = 0.2 * min(1.0, 64 / wide)
    halves = ["attention"] * config["mh_adapter"] + ["output"] * config["output_adapter"]
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_down.0.weight": (BOTTLENECK_SIZE, wide),
        "adapter_down.0.bias": (BOTTLENECK_SIZE,),
        "adapter_up.weight": (wide, BOTTLENECK_SIZE),
        "adapter_up.bias": (wide,),
    }
    if config["scaling"] == "channel":
        shapes["scaling"] = (wide,)
    tensors = {
        f"{names_of(base).layers}{layer}.{half}_adapters.adapters.a.{part}": size
        * torch.randn(shape, generator=generator)
        for layer in range(layers)
        for half in halves
        for part, shape in shapes.items()
    }
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "adapter.safetensors", {"format": "pt"})
    save_file({"lm_head.weight": model.lm_head.weight.detach().clone()}, path / HEAD_FILE)
    return path
