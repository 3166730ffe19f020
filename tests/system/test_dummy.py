"""A server over shapes without weights."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from engine.client import AsyncClient
from tests.system.running import ROOT, running
from zoo.dummy.make import make
from zoo.dummy.recipe import Recipe
from zoo.progress import Quiet

NAMES = ("base", "lora-0", "last-0", "full-0", "delta-0")
FLAGS = ("--load-format", "dummy", "--kv-cache-memory-bytes", str(16 << 20))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dummy") / "zoo"
    counts = ["--loras=1", "--lasts=1", "--last-layers=2", "--fulls=1", "--deltas=1"]
    done = subprocess.run(
        [sys.executable, "-m", "zoo", "dummy", str(root), "--config", "tiny", *counts],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "added 5 variants" in done.stdout
    return root


async def ask_all(endpoint: str) -> list[list[int]]:
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(client.complete(name, [7 + i, 20, 33], max_tokens=16, temperature=0))
            for name in NAMES
            for i in range(3)
        ]
    return [task.result().token_ids for task in tasks]


def test_every_kind_of_variant_answers_the_same_each_time(zoo: Path):
    with running(zoo, *FLAGS) as engine:
        first = uvloop.run(ask_all(engine.zmq))
        blocks = engine.settled() and engine.status()["blocks"]
        assert any("random" in line for line in engine.log)
        make(zoo, Recipe("tiny", loras=2), Quiet())
        engine.wait_for("lora-1")
        with engine.client() as client:
            late = client.complete("lora-1", [7, 20, 33], max_tokens=16, temperature=0)
    assert all(len(tokens) == 16 for tokens in first)
    assert len({tuple(first[3 * i]) for i in range(len(NAMES))}) == len(NAMES)
    assert late.token_ids not in first
    assert any(block["merged_runs"] for block in blocks)
    with running(zoo, *FLAGS) as engine:
        assert uvloop.run(ask_all(engine.zmq)) == first


def test_shapes_without_weights_are_not_served_by_accident(zoo: Path):
    done = subprocess.run(
        [sys.executable, "-m", "engine", "launch", "--zoo", str(zoo), "--http", "none"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "launch with --load-format dummy" in done.stderr
    assert done.stderr.count("\n") == 1
