"""What to keep of a full fine-tune: quality against bytes of the ways that a delta could be kept.

Each way is applied to every matrix of the layers of two really trained fine-tunes (`bench.tunes`);
norms stay exact, and the embedding is the base's, but for `low rank`, which covers it too. The
chain that comes of it is run on the built-in held-out text beside the exact one. `MB` are what is
kept, `share` is that of the model's bytes. `low rank` spreads its ranks over the whole model by
what a byte brings, as near as can be in the matrices themselves or, which is what `--store delta`
does, in what they make of other built-in text.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from bench.codecs import CODECS, Coded
from bench.result import Result
from bench.stage import Stage
from bench.tunes import REAL
from bench.zoos import BASE
from zoo.catalog import Catalog
from zoo.deltas.calibration import Calibration, calibration_text
from zoo.deltas.delta import as_float, compress
from zoo.door import Manifests, offline
from zoo.equivalence.agreement import Agreement
from zoo.equivalence.chains import bounded, manifests_of, tensors_of, written_out
from zoo.equivalence.corpus import read_corpus, tokenizer_of
from zoo.equivalence.probe import Probe
from zoo.manifest import ObjectDigest, Unit
from zoo.store import Store

_SHARES = (1 / 48, 1 / 24, 1 / 12, 1 / 8)


def run(stage: Stage) -> Iterator[Result]:
    """One cell per fine-tune and way."""
    zoo = stage.zoos.tuned("exact", 16 if stage.quick else 64)
    for name in REAL:
        yield from _cells(stage, zoo, name)


def _cells(stage: Stage, zoo: Path, name: str) -> Iterator[Result]:
    store = Store(zoo)
    with closing(Catalog(zoo)) as catalog, offline(zoo) as runner:
        variant, base = catalog.variant(name), catalog.variant(BASE)
        whole, plain = manifests_of(catalog, variant), manifests_of(catalog, base)
        corpus = read_corpus(tokenizer_of(store, variant), None, 32, variant.context)
        probe = Probe(runner, corpus, whole, stage.zoos.progress)
        size = sum(store.info(digest).nbytes for digest in set(variant.tensors.values()))
        yield _result(name, "the base itself", 0, size, probe.agreement(plain, "base"))
        text = calibration_text(store, variant, None)
        reader = runner.load(bounded(whole, text.shape[1] + 1))
        calibration = Calibration(reader, text, stage.zoos.progress)
        for label, chain, kept in _ways(stage, store, (plain, whole), calibration):
            yield _result(name, label, kept, size, probe.agreement(chain, label))
            store.take_back()


def _ways(
    stage: Stage, store: Store, chains: tuple[Manifests, Manifests], calibration: Calibration
) -> Iterator[tuple[str, Manifests, int]]:
    """Each way with the chain it makes, whose objects are there until the next is asked for."""
    plain, whole = chains
    base, tuned = ([unit for _, unit in chain.units] for chain in (plain, whole))
    for label, code in CODECS.items():
        stage.say(f"codecs: {label}")
        units, kept = _coded(store, base, tuned, code)
        yield label, written_out(units, [None] * len(units), whole.context), kept
    for share, reads in itertools.product(_SHARES, (None, calibration)):
        delta = compress(store, base, tuned, share, stage.zoos.progress, reads)
        chain = written_out(delta.units, delta.attachments, whole.context)
        own = tensors_of(chain) - tensors_of(plain)
        kept = sum(store.info(digest).nbytes for digest in own)
        nearest = "in itself" if reads is None else "in what it makes of text"
        yield f"low rank, at most 1/{round(1 / share)}, nearest {nearest}", chain, kept


def _coded(
    store: Store, base: Sequence[Unit], tuned: Sequence[Unit], code: Callable[[Tensor], Coded]
) -> tuple[list[Unit], int]:
    """The fine-tune's units with every matrix of a layer replaced by what its code decodes to."""
    units: list[Unit] = []
    kept = 0
    for theirs, ours in zip(base, tuned, strict=True):
        tensors: dict[str, ObjectDigest] = {}
        for role, digest in ours.tensors.items():
            shape = store.info(digest).shape
            if len(shape) == 1 or digest == theirs.tensors[role]:
                tensors[role] = digest
            elif role in {"tokens.weight", "head.weight", "positions.weight"}:
                tensors[role] = theirs.tensors[role]
            else:
                before = as_float(store.tensor(theirs.tensors[role]))
                decoded, size = code(as_float(store.tensor(digest)) - before)
                tensors[role] = _put(store, before + decoded)
                kept += size
        units.append(Unit(ours.spec, tensors))
    return units, kept


def _put(store: Store, matrix: Tensor) -> ObjectDigest:
    """In float32: what was decoded is not rounded again."""
    whole = matrix.contiguous()
    return store.put_tensor("F32", tuple(whole.shape), whole.numpy().data)


def _result(name: str, label: str, kept: int, size: int, found: Agreement) -> Result:
    return Result(
        scenario="codecs",
        cell=f"{name}: {label}",
        figures={
            "MB": kept / 1e6,
            "share": kept / size,
            "KL": found.kl.value,
            "KL to": found.kl.high,
            "agreement": found.agreement.value,
            "agreement from": found.agreement.low,
            "perplexity": found.perplexity.value,
            "exact perplexity": found.exact_perplexity.value,
        },
    )
