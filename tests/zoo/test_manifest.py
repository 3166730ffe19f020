"""Manifests keep their names: what is digested is written down here."""

from zoo.manifest import AttentionSpec, MlpSpec, Norm, ParallelSpec, Unit, canonical

RMS = Norm("rms", 1e-5)


def test_what_stands_at_its_default_is_not_part_of_a_units_name():
    spec = MlpSpec(8, 16, RMS, "silu")
    assert canonical(Unit(spec, {})) == (
        b'{"spec":{"type":"mlp","hidden":8,"intermediate":16,'
        b'"norm":{"kind":"rms","eps":0.00001},"activation":"silu"},"tensors":{}}'
    )


def test_every_field_that_changes_the_arithmetic_changes_the_name():
    plain = AttentionSpec(8, 2, 1, 4, RMS, 0.5)
    other = [
        AttentionSpec(8, 2, 1, 4, RMS, 0.5, fused=True),
        AttentionSpec(8, 2, 1, 4, RMS, 0.5, fused=True, grouped=True),
        AttentionSpec(8, 2, 1, 4, RMS, 0.5, post_norm=RMS),
        AttentionSpec(8, 2, 1, 4, Norm("rms", 1e-5, offset=1.0), 0.5),
        ParallelSpec(AttentionSpec(8, 2, 1, 4, RMS, 0.5), MlpSpec(8, 16, RMS, "silu")),
    ]
    assert len({canonical(Unit(spec, {})) for spec in (plain, *other)}) == 1 + len(other)
