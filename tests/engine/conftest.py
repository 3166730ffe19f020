"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest

from tests.engine import rig


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A catalog with one variant, "base", that has text files and no weights."""
    path = tmp_path / "zoo"
    rig.publish(path, rig.variant_of(path, "base"))
    return path
