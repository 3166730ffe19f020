"""Finds a family by the `model_type` of a checkpoint's config, or by its own name: one with a file
of its own here, else one that runs through transformers' own layers."""

from zoo.families.family import Family
from zoo.families.foreign import foreign_family
from zoo.families.gemma3 import GEMMA3
from zoo.families.gpt2 import GPT2
from zoo.families.gpt_neox import GPT_NEOX
from zoo.families.llama import LLAMA
from zoo.families.mistral import MISTRAL
from zoo.families.phi3 import PHI3
from zoo.families.qwen2 import QWEN2
from zoo.families.qwen3 import QWEN3

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA3, GPT2, GPT_NEOX)


def family_of(model_type: str) -> Family:
    """The family that reads configs of this type; raises UnsupportedFamily."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return foreign_family(model_type)


def family_named(name: str) -> Family:
    """The family that a variant's record names."""
    for family in FAMILIES:
        if family.name == name:
            return family
    return foreign_family(name)


def is_native(name: str) -> bool:
    """Whether the family of that name has a file of its own, and so kernels for all of it."""
    return any(family.name == name for family in FAMILIES)
