"""An adapter becomes a variant upon its base: placed piece by piece, or merged where no piece can
say what it does."""

from zoo.adapters.adapter import Adapter
from zoo.adapters.draft import Draft
from zoo.adapters.fit import fit, is_merged, kind_of
from zoo.adapters.merge import merged_bytes, place_merged
from zoo.adding.bases import base_of_adapter
from zoo.adding.golden import golden_sequences
from zoo.adding.options import AddOptions
from zoo.adding.reference import Expected, merge, run
from zoo.adding.witness import call_witness, lacks
from zoo.catalog import Publication
from zoo.compose import compose_adapter, compose_tuned, ground_of, publication_of
from zoo.errors import BadAdapter
from zoo.manifest import Prefix, SoftPrompt, TokenRows, Variant
from zoo.progress import Progress
from zoo.stored import store_origin
from zoo.zoo import Zoo

_MB = 1e6


def prepare_adapter(
    zoo: Zoo, name: str, adapter: Adapter, options: AddOptions, progress: Progress
) -> tuple[Publication, Expected | None]:
    """Place everything, then write it, then compose what the catalog has to know; and what peft
    computes, where there is room for it."""
    base = base_of_adapter(zoo.catalog, adapter, options.base)
    units = [zoo.catalog.unit(unit) for unit in zoo.catalog.chain(base.chain).units]
    ground = ground_of(zoo.store, base, units)
    merging = is_merged(adapter)
    draft = Draft() if merging else fit(adapter, ground)
    trouble = lacks(zoo.store, base, adapter.method) if merging or options.golden else "unasked"
    if trouble and merging:
        raise BadAdapter(f"{adapter.source} has to be merged by peft: {trouble}")
    if trouble and options.golden:
        progress.say(f"{adapter.source} is not checked against peft: {trouble}")
    expected: Expected | None = None
    if not trouble:
        model = call_witness(zoo.store, base, adapter, ground, draft.vocabulary)
        if options.golden:
            sequences = golden_sequences(*_scope(base, draft))
            expected = run(model, progress.track(sequences, f"running {name} whole"))
        if merging:
            draft = place_merged(adapter, ground, merge(model, adapter.source))
            progress.say(
                f"{adapter.source} is of a type that is merged into the base: "
                f"{merged_bytes(draft) / _MB:.1f} MB of its weights are the variant's own"
            )
        del model
    stored = store_origin(zoo.store, name, adapter, progress)
    derived = {
        label: zoo.store.put_tensor(tensor.dtype, tensor.shape, tensor.data)
        for label, tensor in draft.derived.items()
    }
    tuned = compose_tuned(units, draft, {**stored.tensors, **derived})
    variant, chain = compose_adapter(kind_of(adapter, draft), base, units, tuned, stored)
    return publication_of(zoo.store, variant, chain, tuned), expected


def _scope(base: Variant, draft: Draft) -> tuple[int, int, list[int]]:
    """Vocabulary and context of the sequences to try, and the tokens that must be among them."""
    pieces = [piece for found in draft.pieces.values() for piece in found]
    rows = [draft.derived[piece.ids] for piece in pieces if isinstance(piece, TokenRows)]
    special = {int(token) for row in rows for token in row.data.cast("q")}
    virtual = max((p.length for p in pieces if isinstance(p, Prefix | SoftPrompt)), default=0)
    vocabulary = draft.vocabulary or base.vocabulary
    added = range(base.vocabulary, vocabulary)
    return vocabulary, max(1, base.context - virtual), [*sorted(special), *added]
