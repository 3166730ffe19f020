"""An adapter put upon its base: which way each of peft's types goes."""

from collections.abc import Callable, Mapping

from zoo.adapters.adapter import Adapter
from zoo.adapters.biases import place_beft
from zoo.adapters.bottleneck import place_bottleneck
from zoo.adapters.draft import Draft
from zoo.adapters.gains import place_ia3
from zoo.adapters.ground import Ground
from zoo.adapters.lora import place_lora
from zoo.adapters.prompts import place_prefix, place_prompt
from zoo.adapters.tokens import place_trainable_tokens
from zoo.adapters.whole import agree_vocabulary, place_whole
from zoo.errors import BadAdapter
from zoo.sources.weights import FLOATS

Placer = Callable[[Adapter, Ground, Draft], None]

# Settings of a LoRA with which its layers are no longer W x + scale B A x of the base's own W.
_MERGED_SETTINGS = (
    *("target_parameters", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config"),
    *("megatron_config", "velora_config", "mica_config"),
)
# What no fixed weights can stand for: the layers that run depend on the request, or there are more.
_REFUSED_SETTINGS = {
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "arrow_config": "Arrow routing",
}
_REFUSED = {
    "XLORA": "mixes its experts anew for every token",
    "POLY": "chooses its skills by a task's number that requests do not carry",
    "ADAPTION_PROMPT": "attends to a prompt of its own inside each layer",
    "MULTITASK_PROMPT_TUNING": "chooses its prompt by a task's number that requests do not carry",
}
# Initializations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) shift it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def place_norms(adapter: Adapter, ground: Ground, draft: Draft) -> None:
    """Norm tuning: whole norms."""
    for name in adapter.tensors:
        place_whole(adapter, ground, draft, name)


_PLACERS: Mapping[str, tuple[str | None, Placer]] = {
    "LORA": ("lora", place_lora),
    "IA3": ("ia3", place_ia3),
    "PREFIX_TUNING": ("prefix", place_prefix),
    "CARTRIDGE": ("prefix", place_prefix),
    "PROMPT_TUNING": ("prompt", place_prompt),
    "P_TUNING": ("prompt", place_prompt),
    "CPT": ("prompt", place_prompt),
    "TRAINABLE_TOKENS": ("tokens", place_trainable_tokens),
    "LN_TUNING": ("norm", place_norms),
    "BEFT": ("bias", place_beft),
    "BOTTLENECK": ("bottleneck", place_bottleneck),
}


def is_merged(adapter: Adapter) -> bool:
    """Whether the adapter has to be merged into units of its own; raises BadAdapter for one that
    cannot be served at all."""
    method, settings = adapter.method, adapter.settings
    if method in _REFUSED:
        raise BadAdapter(f"{adapter.source} is of peft's type {method}, which {_REFUSED[method]}")
    for key, feature in _REFUSED_SETTINGS.items():
        if settings.get(key):
            raise BadAdapter(f"{adapter.source} uses {feature} ({key}), which cannot be served")
    if method != "LORA":
        return method not in _PLACERS
    if settings.get("init_lora_weights", True) not in _PLAIN_STARTS:
        return True
    return any(settings.get(key) for key in _MERGED_SETTINGS)


def fit(adapter: Adapter, ground: Ground) -> Draft:
    """Put every tensor of the adapter on its base, or raise BadAdapter for the first that has no
    place. Not for what `is_merged`."""
    for name, tensor in adapter.tensors.items():
        if tensor.dtype not in FLOATS:
            raise BadAdapter(
                f"tensor {name!r} of {adapter.source} has the data type {tensor.dtype}"
            )
    draft = Draft()
    _PLACERS[adapter.method][1](adapter, ground, draft)
    draft.vocabulary = agree_vocabulary(adapter, ground, draft)
    return draft


def kind_of(adapter: Adapter, draft: Draft) -> str:
    """What the variant is called: its type, "dora" and "bias" where a LoRA is one of these, or
    "merged:" and the type."""
    if is_merged(adapter):
        return f"merged:{adapter.method.lower()}"
    if adapter.settings.get("use_dora"):
        return "dora"
    if adapter.method == "LORA" and draft.kind in {"bias", "norm"}:
        return draft.kind
    return _PLACERS[adapter.method][0] or draft.kind
