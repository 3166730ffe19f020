"""The commands `status` and `top`: what a running engine tells of itself, as tables."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from engine.client import Client

REFRESH_S = 1.0
# An engine on this machine answers at once; one that is busy, soon.
TIMEOUT_S = 5.0
# Rows of a table in `top`, which has one screen.
MAX_ROWS = 20


def status(endpoint: str, api_key: str | None, *, as_json: bool) -> None:
    """Print the state once. Raises EngineError."""
    with Client(endpoint, api_key, timeout_s=TIMEOUT_S) as client:
        state = client.status()
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
    else:
        Console().print(render(state))


def top(endpoint: str, api_key: str | None) -> None:
    """Show the state until Ctrl-C. Raises EngineError."""
    with (
        Client(endpoint, api_key, timeout_s=TIMEOUT_S) as client,
        Live(screen=True, auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while True:
            live.update(render(client.status(), max_rows=MAX_ROWS), refresh=True)
            time.sleep(REFRESH_S)


def render(state: Mapping[str, Any], max_rows: int | None = None) -> Group:
    """The tables for a status reply."""
    requests = state["requests"]
    head = (
        f"{state['state']}, up {state['uptime_s']:.0f} s, "
        f"{requests['running']} running, {requests['waiting']} waiting"
    )
    return Group(
        head,
        _workers(state["workers"]),
        _devices(state["workers"]),
        _blocks(state["blocks"], max_rows),
        _variants(state["variants"], max_rows),
    )


def _workers(workers: list[dict[str, Any]]) -> Table:
    table = _table("Workers", "name", "device", "ops", "running", "waiting", "KV", "weights", "RSS")
    table.add_column("steps", justify="right")
    for worker in workers:
        table.add_row(
            worker["name"],
            worker["device"],
            f"{worker['ops']} {worker['dtype']}",
            str(worker.get("running", 0)),
            str(worker.get("waiting", 0)),
            f"{worker.get('kv_usage', 0):.0%} of {worker.get('total_pages', 0)} pages"
            f" of {worker['kv_dtype']}",
            f"{_megabytes(worker.get('resident_bytes'))} {worker['weights']}".strip(),
            _megabytes(worker.get("rss_bytes")),
            str(worker.get("steps", 0)),
        )
    return table


def _devices(workers: list[dict[str, Any]]) -> Table:
    """What the devices tell of themselves; those that tell nothing have a row of blanks."""
    table = _table("Devices", "worker", "busy", "memory", "power", "temperature", "links")
    for worker in workers:
        told: Mapping[str, float] = worker.get("gauges") or {}
        used, total = told.get("memory_used_bytes"), told.get("memory_total_bytes")
        table.add_row(
            worker["name"],
            _shown(told.get("utilization"), "{:.0%}"),
            "" if used is None or total is None else f"{used / 1e9:.1f} of {total / 1e9:.1f} GB",
            _shown(told.get("power_w"), "{:.0f} W"),
            _shown(told.get("temperature_c"), "{:.0f} °C"),
            _links(told),
        )
    return table


def _links(told: Mapping[str, float]) -> str:
    """Traffic over PCIe, and how many NVLinks there are."""
    sent, received = told.get("pcie_sent_bytes_per_s"), told.get("pcie_received_bytes_per_s")
    parts: list[str] = []
    if sent is not None and received is not None:
        parts.append(f"PCIe {received / 1e9:.1f} in, {sent / 1e9:.1f} out GB/s")
    if told.get("nvlinks"):
        parts.append(f"{told['nvlinks']:.0f} NVLinks")
    return ", ".join(parts)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _blocks(blocks: list[dict[str, Any]], max_rows: int | None) -> Table:
    table = _table("Blocks", "worker", "block", "units", "size", "variants", "runs", "mean batch")
    for block in sorted(blocks, key=lambda block: block["rows"], reverse=True)[:max_rows]:
        units = f"{block['first']}-{block['first'] + block['units'] - 1}"
        table.add_row(
            block["worker"],
            block["digest"][:12],
            units,
            _megabytes(block["bytes"]),
            str(block["chains"]),
            str(block["runs"]),
            f"{block['mean_batch']:.1f}",
        )
    return table


def _variants(variants: list[dict[str, Any]], max_rows: int | None) -> Table:
    table = _table("Variants", "name", "kind", "base", "residency", "size", "running", "waiting")
    for variant in variants[:max_rows]:
        table.add_row(
            variant["name"],
            variant["kind"],
            variant["base"] or "",
            variant["residency"],
            _megabytes(variant.get("chain_bytes")),
            str(variant["running"]),
            str(variant["waiting"]),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    return table


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} MB"
