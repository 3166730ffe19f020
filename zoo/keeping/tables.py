"""The listings as tables for a person; the same records go out whole with --json."""

from collections.abc import Sequence
from datetime import datetime

from rich.table import Table

from zoo.catalog import Alias
from zoo.keeping.fit import Fit
from zoo.keeping.history import VersionRow
from zoo.keeping.listing import BlockRow, Stats, VariantDetail, VariantRow
from zoo.keeping.sizes import size
from zoo.keeping.sweep import Rubbish
from zoo.keeping.verify import Verdict

_MANY = 4


def variants_table(rows: Sequence[VariantRow]) -> Table:
    """`list`."""
    table = _table("name", "version", "kind", "base", "family")
    for heading in ("blocks", "changed", "attached", "own", "shared"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.reference,
            row.kind,
            row.base or "-",
            _family(row),
            str(row.blocks),
            str(row.changed),
            str(row.attached),
            size(row.own_bytes),
            size(row.shared_bytes),
        )
    return table


def detail_table(detail: VariantDetail) -> Table:
    """`show`: the units of the chain."""
    table = _table("unit", "kind", "digest", "bytes", "attachment", "also used by")
    for unit in detail.chain_units:
        others = [name for name in unit.variants if name != detail.variant.name]
        table.add_row(
            str(unit.index),
            unit.kind,
            unit.digest[:12],
            size(unit.bytes),
            ", ".join(unit.pieces) or "-",
            _some(others),
        )
    return table


def detail_lines(detail: VariantDetail) -> list[str]:
    """`show`: what stands above the table."""
    row = detail.variant
    base = f" of {row.base}" if row.base else ""
    return [
        f"{row.name}: {row.kind}{base}, {_family(row)}, {row.dtype}, from {row.source}",
        f"version {row.reference}, aliases: {', '.join(row.aliases) or '(none)'}",
        f"context {row.context}, vocabulary {detail.vocabulary}, hidden {detail.hidden}",
        f"ends at token {', '.join(map(str, detail.eos)) or '(none)'}; chain {detail.chain}",
        f"{row.units} units in {row.blocks} blocks: {row.shared} shared with the base",
        f"{row.changed} units changed, {row.attached} with an attachment",
        "golden check: "
        + ("not made" if detail.golden is None else f"logits within {detail.golden:.0e}"),
        f"{size(row.own_bytes)} its own, {size(row.shared_bytes)} shared",
        f"files: {', '.join(detail.files) or '(none)'}",
    ]


def blocks_table(rows: Sequence[BlockRow]) -> Table:
    """`blocks`."""
    table = _table("digest", "units", "bytes", "variants", "used by")
    for row in rows:
        table.add_row(
            row.digest[:12],
            f"{row.first}-{row.last - 1}" if row.units > 1 else str(row.first),
            size(row.bytes),
            str(len(row.variants)),
            _some(row.variants),
        )
    return table


def stats_lines(stats: Stats) -> list[str]:
    """`stats`."""
    return [
        f"{stats.variants} variants: {stats.units} units in {stats.blocks} blocks",
        f"{stats.objects} objects, {size(stats.disk_bytes)} on disk, and a catalog of "
        + size(stats.catalog_bytes),
        f"{size(stats.tensor_bytes)} of distinct tensors, {size(stats.serving_bytes)} to serve all",
        f"{size(stats.source_bytes)} in all sources: {stats.ratio:.2f} x what is on disk",
        f"{size(stats.model_bytes)} if each variant were a whole model of its own",
    ]


def versions_table(rows: Sequence[VersionRow]) -> Table:
    """`versions`."""
    table = _table("version", "chain", "created", "source", "aliases", "")
    for row in rows:
        state = "current" if row.is_current else "there" if row.is_there else "swept"
        created = datetime.fromtimestamp(row.created).isoformat(" ", "seconds")
        aliases = ", ".join(row.aliases) or "-"
        table.add_row(row.reference, row.chain[:12], created, row.source, aliases, state)
    return table


def aliases_table(rows: Sequence[Alias]) -> Table:
    """`alias`."""
    table = _table("alias", "version")
    for row in rows:
        table.add_row(row.alias, row.reference)
    return table


def rubbish_lines(rubbish: Rubbish, *, deleted: bool) -> list[str]:
    """`sweep`."""
    done = "deleted" if deleted else "would delete (give --yes to do so)"
    lines = [f"{done}: older version {reference}" for reference in rubbish.versions]
    lines += [f"{done}: {path}, work that nobody went on with" for path in rubbish.work]
    count = len(rubbish.objects) + len(rubbish.leftovers)
    return [*lines, f"{done}: {count} objects, {size(rubbish.bytes)}"]


def fit_table(found: Fit) -> Table:
    """`fit`."""
    table = _table("name")
    for heading in ("adds", "in all", "frees", "left for KV", ""):
        table.add_column(heading, justify="right")
    for row in found.variants:
        sizes = (row.adds_bytes, row.total_bytes, row.frees_bytes, row.left_bytes)
        table.add_row(row.name, *map(size, sizes), "fits" if row.fits else "does not fit")
    return table


def fit_lines(found: Fit) -> list[str]:
    """`fit`: what stands above the table."""
    load = f"{found.sequences} sequences of {found.context} positions"
    lines = [
        f"{found.fitting} of {len(found.variants)} variants fit into {size(found.memory_bytes)}",
        f"{size(found.weights_bytes)} of weights, {size(found.kv_bytes)} of KV for {load}",
        f"{size(found.left_bytes)} are left: {found.more_sequences} more such sequences",
    ]
    if found.addition:
        addition = found.addition
        lines.append(
            f"{addition.kind} would add {size(addition.adds_bytes)}: "
            f"{addition.fits} like it fit beside all there are"
        )
    return lines


def damage_lines(verdict: Verdict) -> list[str]:
    """`verify`."""
    lines = [
        f"{damage.fault} object {damage.digest}: "
        + (f"used by {', '.join(damage.variants)}" if damage.variants else "used by no variant")
        + (f"; found by {', '.join(damage.findings)}" if damage.findings else "")
        for damage in verdict.damages
    ]
    if not lines:
        return [f"{verdict.checked} objects checked, all good"]
    lines.append(f"{verdict.checked} objects checked, {len(lines)} bad")
    if verdict.checked:
        lines.append("adding again what they came from mends them: add NAME SOURCE --replace")
    return lines


def _family(row: VariantRow) -> str:
    return row.family if row.is_native else f"{row.family} (transformers' layers)"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MANY])
    return f"{shown} + {len(names) - _MANY} more" if len(names) > _MANY else shown or "-"
