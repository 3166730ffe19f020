"""What was found of derived models, as tables and lines for a person."""

from collections.abc import Sequence

from rich.table import Table

from zoo.derived.judgement import TRUE, Quality
from zoo.derived.profile import BlockProfile
from zoo.derived.stitch import StitchFinding
from zoo.derived.surrogate import SurrogateFinding
from zoo.keeping.tables import size

_QUALITY = ("perplexity", "KL (nats)", "same best token")


def surrogate_lines(finding: SurrogateFinding) -> list[str]:
    """What was made, in a few lines."""
    verdict, shape, losses = finding.verdict, finding.shape, finding.losses
    kept = f"{shape.layers} layers of {shape.groups} KV heads and {shape.neurons} neurons"
    return [
        f"{finding.name} stands in for {finding.of}: {kept}, {finding.weights:.0%} of the weights",
        f"loss {losses[0]:.2f} at first, {losses[1]:.2f} after {finding.steps} steps",
        f"judged on held-out text of {verdict.corpus}",
        f"a decoding step takes 1/{verdict.speedup:.2f} of the processor time",
    ]


def surrogate_table(finding: SurrogateFinding) -> Table:
    """The surrogate beside the true chain and what costs nothing."""
    verdict = finding.verdict
    shown = Table("", *_QUALITY, "guesses kept", "kept of 4")
    for name in dict.fromkeys((*verdict.quality, *verdict.acceptance)):
        quality, kept = verdict.quality.get(name), verdict.acceptance.get(name)
        figures = _quality(quality) if quality else ("", "", "")
        share = (f"{kept.share:.1%}", f"{kept.run:.2f}") if kept else ("", "")
        shown.add_row(name, *figures, *share)
    return shown


def stitch_lines(finding: StitchFinding) -> list[str]:
    """What was made, in a few lines."""
    a, best = finding.a, finding.best
    lines = [
        f"stitches from {a} to {finding.b}, {finding.steps} steps each",
        f"judged against {a} on held-out text of {finding.corpus}",
    ]
    if finding.name is not None and finding.pace is not None:
        share = finding.pace["joined"].work_s / finding.pace["A"].work_s
        lines.append(f"{finding.name} joins them at {best.below}:{best.above}")
        lines.append(f"a decoding step of it takes {share:.2f} times the processor time of {a}")
    return lines


def stitch_table(finding: StitchFinding) -> Table:
    """Every join with what else could be put there."""
    shown = Table("join", "map", *_QUALITY)
    shown.add_row("", TRUE, *_quality(finding.true))
    for join in finding.joins:
        for name, quality in join.quality.items():
            shown.add_row(f"{join.below}:{join.above}", name, *_quality(quality))
    return shown


def profile_table(rows: Sequence[BlockProfile]) -> Table:
    """One line per block."""
    shown = Table(
        "block", "of", "units", "bytes", "KV/token", "disk", "host", "1 row", "16 rows", "error"
    )
    for row in rows:
        context = row.decode.points[0].context
        shown.add_row(
            row.block[:12],
            row.of,
            f"{row.depth}-{row.depth + row.units - 1}",
            size(row.resident_bytes),
            size(row.kv_bytes_per_token),
            _ms(row.load_disk_s),
            _ms(row.load_host_s),
            _ms(row.decode.predict(1, context)),
            _ms(row.decode.predict(16, context)),
            f"{row.decode.error.median:.0%}, at most {row.decode.error.largest:.0%}",
        )
    return shown


def _quality(quality: Quality) -> tuple[str, str, str]:
    kl, same = quality.kl, quality.agreement
    return (
        f"{quality.perplexity.value:.2f}",
        f"{kl.value:.3f} ({kl.low:.3f}-{kl.high:.3f})",
        f"{same.value:.1%} ({same.low:.1%}-{same.high:.1%})",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
