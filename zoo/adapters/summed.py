"""A weighted sum of LoRAs as one LoRA of peft: what is exported, and what the golden check asks
peft about."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from zoo.families.family import Family, Place
from zoo.manifest import Attachment, AttentionSpec, EmbedSpec, LowRank, MlpSpec, ParallelSpec, Unit
from zoo.sources.values import as_tensor, read_values
from zoo.sources.weights import SourceTensor
from zoo.store import Store

_PREFIX = "base_model.model."


def lora_of(
    store: Store, family: Family, units: Sequence[Unit], attachments: Sequence[Attachment | None]
) -> tuple[bytes, dict[str, SourceTensor]]:
    """An adapter_config.json and tensors: per module the ranks stand one below the other, and the
    scales are in A."""
    ranks: dict[str, int] = {}
    tensors: dict[str, SourceTensor] = {}
    layers = family.num_layers(len(units))
    for index, attachment in enumerate(attachments):
        spec = units[index].spec
        times = spec.scale if isinstance(spec, EmbedSpec) else 1.0
        for role, pieces in _by_role(attachment).items():
            path = family.tensor_name(Place(index, f"{role}.weight"), layers)
            path = path.removesuffix(".weight")
            a = np.concatenate(
                [np.float32(p.scale / times) * read_values(store.tensor(p.a)) for p in pieces]
            )
            b = np.concatenate([read_values(store.tensor(p.b)) for p in pieces], axis=1)
            ranks[path] = len(a)
            form = ".lora_embedding_{}" if role == "tokens" else ".lora_{}.weight"
            tensors[_PREFIX + path + form.format("A")] = as_tensor(a)
            tensors[_PREFIX + path + form.format("B")] = as_tensor(b)
    lying = any(
        isinstance(unit.spec, AttentionSpec | MlpSpec | ParallelSpec) and unit.spec.transposed
        for unit in units
    )
    return _config(ranks, lying), tensors


def _by_role(attachment: Attachment | None) -> dict[str, list[LowRank]]:
    found: dict[str, list[LowRank]] = {}
    for piece in attachment.pieces if attachment else ():
        assert isinstance(piece, LowRank), "a sum is made of nothing else"
        found.setdefault(piece.role, []).append(piece)
    return found


def _config(ranks: Mapping[str, int], transposed: bool) -> bytes:
    """Rank and alpha are the same everywhere, so that the scale is 1."""
    patterns = {f"^{path.replace('.', r'[.]')}$": rank for path, rank in ranks.items()}
    return msgspec.json.encode(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": max(ranks.values()),
            "lora_alpha": max(ranks.values()),
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": sorted(ranks),
            "fan_in_fan_out": transposed,
        }
    )
