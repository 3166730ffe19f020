"""The witness of a new variant: the whole model that transformers and peft make of its base and an
adapter, where this machine can run it."""

import importlib.util
import math

from zoo.adapters.adapter import Adapter
from zoo.adapters.ground import Ground
from zoo.adding.golden import lacking_bytes
from zoo.adding.reference import AnyModel, rebuild, tune
from zoo.manifest import Variant
from zoo.store import Store

_LIBRARY = "BOTTLENECK"


def lacks(store: Store, base: Variant, method: str) -> str:
    """What is wanting to run the base whole with an adapter of that method; empty if nothing."""
    infos = [store.info(tensor) for tensor in base.tensors.values()]
    wide = sum(4 * math.prod(info.shape) for info in infos)
    lacking = lacking_bytes(wide, sum(info.nbytes for info in infos))
    if lacking > 0:
        return f"{lacking / 1e6:.0f} MB of memory are wanting to run {base.name!r} whole"
    if method != _LIBRARY and importlib.util.find_spec("peft") is None:
        return "peft is not installed: pip install peft"
    return ""


def call_witness(
    store: Store, base: Variant, adapter: Adapter, ground: Ground, vocabulary: int
) -> AnyModel:
    """The base with the adapter on it; `vocabulary` is what the adapter makes of the base's, 0 if
    it leaves it alone."""
    tensors = {name: store.tensor(digest) for name, digest in base.tensors.items()}
    model: AnyModel = rebuild(
        {"config.json": store.blob(base.files["config.json"])}, tensors, base.source
    )
    if vocabulary not in {0, model.config.vocab_size}:
        # What the new rows hold is in the adapter.
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if adapter.method == _LIBRARY:
        from zoo.adapters.detours import hook_bottlenecks

        hook_bottlenecks(model, adapter, ground)
        return model
    return tune(model, adapter.folder, adapter.source)
