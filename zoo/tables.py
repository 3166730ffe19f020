"""The listings as tables for a person; the same records go out whole with --json."""

from collections.abc import Sequence

from rich.table import Table

from zoo.listing import BlockRow, Stats, VariantDetail, VariantRow
from zoo.verify import Verdict

_MANY = 4


def variants_table(rows: Sequence[VariantRow]) -> Table:
    """`list`."""
    table = _table("name", "kind", "base", "family")
    for heading in ("blocks", "changed", "attached", "own", "shared"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.kind,
            row.base or "-",
            row.family,
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
            unit.attachment[:12] if unit.attachment else "-",
            _some(others),
        )
    return table


def detail_lines(detail: VariantDetail) -> list[str]:
    """`show`: what stands above the table."""
    row = detail.variant
    base = f" of {row.base}" if row.base else ""
    return [
        f"{row.name}: {row.kind}{base}, {row.family}, {row.dtype}, from {row.source}",
        f"context {row.context}, vocabulary {detail.vocabulary}, hidden {detail.hidden}",
        f"ends at token {', '.join(map(str, detail.eos)) or '(none)'}; chain {detail.chain}",
        f"{row.units} units in {row.blocks} blocks: {row.shared} shared with the base",
        f"{row.changed} units changed, {row.attached} with an attachment",
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


def damage_lines(verdict: Verdict) -> list[str]:
    """`verify`."""
    lines = [
        f"{damage.fault} object {damage.digest}: "
        + (f"used by {', '.join(damage.variants)}" if damage.variants else "used by no variant")
        for damage in verdict.damages
    ]
    bad = len(verdict.damages)
    return [
        *lines,
        f"{verdict.checked} objects checked, {bad} bad"
        if bad
        else f"{verdict.checked} objects checked, all good",
    ]


def size(count: int) -> str:
    """Bytes in decimal units, as disks are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MANY])
    return f"{shown} + {len(names) - _MANY} more" if len(names) > _MANY else shown or "-"
