"""What was measured stays in the catalog, and what it names stays in the store."""

from pathlib import Path

import msgspec
import pytest

from zoo.catalog import Catalog
from zoo.errors import DamagedCatalog
from zoo.findings import Findings
from zoo.keeping.sweep import sweep
from zoo.keeping.verify import verify
from zoo.progress import Quiet
from zoo.store import Store


class Length(msgspec.Struct, frozen=True):
    """A finding of this test's own."""

    metres: float
    of: str = ""


def test_findings_are_read_back_by_kind_and_key(root: Path):
    findings = Findings(Catalog(root, writable=True))
    findings.put("length", "a", Length(1.5))
    findings.put("length", "b", Length(2.5, "rope"))
    findings.put("width", "a", Length(9.0))
    read = Findings(Catalog(root))
    assert read.get("length", "b", Length) == Length(2.5, "rope")
    assert read.get("length", "c", Length) is None
    assert read.all("length", Length) == {"a": Length(1.5), "b": Length(2.5, "rope")}
    findings.put("length", "a", Length(3.5))
    findings.remove("length", "b")
    findings.remove("length", "nothing")
    assert read.all("length", Length) == {"a": Length(3.5)}


def test_a_zoo_that_is_not_there_has_no_findings(root: Path):
    assert Findings(Catalog(root)).all("length", Length) == {}
    assert not root.exists()


def test_a_finding_of_another_shape_is_refused(root: Path):
    class Colour(msgspec.Struct, frozen=True):
        hue: int

    Findings(Catalog(root, writable=True)).put("length", "a", Length(1.5))
    with pytest.raises(DamagedCatalog, match="broken finding of kind length"):
        Findings(Catalog(root)).get("length", "a", Colour)


def test_the_sweep_keeps_what_findings_name_for_as_long_as_they_are_there(root: Path):
    store = Store(root)
    kept, replaced, loose = (store.put_blob(data) for data in (b"kept", b"replaced", b"loose"))
    findings = Findings(Catalog(root, writable=True))
    findings.put("length", "a", Length(1.5), [replaced])
    findings.put("length", "a", Length(1.5), [kept])
    assert findings.objects() == {kept: ["length a"]}
    rubbish = sweep(root, delete=True, wait_s=1, progress=Quiet())
    assert rubbish.objects == sorted([replaced, loose])
    findings.remove("length", "a")
    assert sweep(root, delete=True, wait_s=1, progress=Quiet()).objects == [kept]


def test_verify_says_which_findings_a_bad_object_touches(root: Path):
    store = Store(root)
    damaged, missing = store.put_blob(b"damaged"), store.put_blob(b"missing")
    findings = Findings(Catalog(root, writable=True))
    findings.put("length", "a", Length(1.5), [damaged, missing])
    findings.put("length", "b", Length(1.5), [damaged])
    path = store.path(damaged)
    path.chmod(0o644)
    path.write_bytes(b"demaged")
    store.delete(missing)
    found = {
        damage.digest: (damage.fault, damage.findings) for damage in verify(root, Quiet()).damages
    }
    assert found == {
        damaged: ("damaged", ["length a", "length b"]),
        missing: ("missing", ["length a"]),
    }
