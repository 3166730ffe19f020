"""Fixtures of the engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import rig
from tests.engine.httpserver import Site, serve


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A catalog with one variant, "base", that has text files and no weights."""
    path = tmp_path / "zoo"
    rig.publish(path, rig.variant_of(path, "base"))
    return path


@pytest.fixture(scope="session")
def shared_site() -> Iterator[Site]:
    """One HTTP process for all tests that leave it as it is."""
    with serve() as site:
        yield site


@pytest.fixture
def site(shared_site: Site) -> Site:
    """The shared HTTP process before an engine that has seen nothing yet."""
    shared_site.engine.seen.clear()
    shared_site.engine.state = "ready"
    return shared_site
