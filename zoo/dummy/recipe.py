"""What a dummy zoo holds: a base of given shapes, and how many variants of each kind stand upon
it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import BadSource, UnsupportedOption

BASE = "base"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """`config` is one of `PRESETS`, a config.json or its folder. Variants are called base, lora-0,
    last-0 (its last `last_layers` layers are its own), full-0 and delta-0 (a full fine-tune as
    differences of `delta_rank` to every matrix), counted up; equal seeds give equal weights."""

    config: str
    seed: int = 0
    dtype: str = "bfloat16"
    loras: int = 0
    rank: int = 16
    lasts: int = 0
    last_layers: int = 4
    fulls: int = 0
    deltas: int = 0
    delta_rank: int = 128

    def check(self) -> None:
        """Refuse what no zoo could hold."""
        if self.dtype not in DTYPES:
            raise UnsupportedOption(f"--dtype {self.dtype!r} is unknown: use {', '.join(DTYPES)}")
        for name in ("loras", "lasts", "fulls", "deltas"):
            if getattr(self, name) < 0:
                raise UnsupportedOption(f"--{name} counts variants: give a number from 0")
        for name in ("rank", "last_layers", "delta_rank"):
            if getattr(self, name) < 1:
                raise UnsupportedOption(f"--{name.replace('_', '-')} must be at least 1")

    def config_json(self) -> bytes:
        """The base's config.json; raises BadSource."""
        if self.config in PRESETS:
            return json.dumps(PRESETS[self.config].config(), indent=2).encode()
        path = Path(self.config).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise BadSource(
                f"{self.config!r} is no config.json, no folder with one, and none of the shapes "
                f"{', '.join(PRESETS)}"
            )
        return path.read_bytes()


@dataclass(frozen=True, slots=True)
class LlamaShapes:
    """The numbers of a Llama's config that decide how large it is and how it turns positions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    theta: float
    rope_scaling: Mapping[str, Any] | None = None
    tied: bool = False

    def config(self) -> dict[str, Any]:
        """A transformers config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rope_theta": self.theta,
            "rope_scaling": self.rope_scaling,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            # No token ends an answer: which one would, random weights cannot say.
            "eos_token_id": None,
            "bos_token_id": None,
        }


_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PRESETS: Mapping[str, LlamaShapes] = {
    "tiny": LlamaShapes(64, 128, 4, 4, 2, 512, 2048, 1e4),
    "smollm2-135m": LlamaShapes(576, 1536, 30, 9, 3, 49152, 8192, 1e5, tied=True),
    "llama-2-7b": LlamaShapes(4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-3.1-8b": LlamaShapes(4096, 14336, 32, 32, 8, 128256, 131072, 5e5, _LLAMA_31_ROPE),
    "llama-3.1-70b": LlamaShapes(8192, 28672, 80, 64, 8, 128256, 131072, 5e5, _LLAMA_31_ROPE),
}
