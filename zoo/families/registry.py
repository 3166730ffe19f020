"""Finds a family by the `model_type` of a checkpoint's config, or by its own name."""

from zoo.errors import UnsupportedFamily
from zoo.families.family import Family
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
    """The family that reads configs of this type; raises UnsupportedFamily, which names those
    known."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise UnsupportedFamily(
        f"models of type {model_type!r} are not supported: supported are {known}"
    )


def family_named(name: str) -> Family:
    """The family that a variant's record names."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UnsupportedFamily(f"this version does not know the family {name!r}")
