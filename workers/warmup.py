"""What a device does for the first time, done before a chain is ready: kernels are compiled, and a
decode step is captured, so that no request waits for either."""

import logging
import time
from collections.abc import Iterator

import torch

from workers.batcher import Step, arrange
from workers.chains import ServedChain
from workers.memory import KvMemory
from workers.requests import Request, Span, laid_out
from workers.runner import Runner
from workers.wire import RequestId, Sampling

_log = logging.getLogger(__name__)

_NOBODY = RequestId(-1)
# Longer is worth a line.
_SHOWN_S = 1.0


def warm_up(runner: Runner, memory: KvMemory, chain: ServedChain) -> None:
    """Run a short prompt and a token of a chain that the runner has, on the page that padding uses.
    A chain for whose warm-up there is no room, or that fails at it, is served without."""
    if not memory.free_slots:
        return
    began = time.perf_counter()
    slot, table = memory.take_slot(chain.num_layers, 1)
    table[...] = memory.pool(chain.kv).num_ids
    try:
        with torch.inference_mode():
            for step in _steps(chain, slot, memory.page):
                runner.run(arrange([step]))
    except (RuntimeError, MemoryError) as error:
        _log.warning("a chain is served without being warmed up: %s", error)
    finally:
        memory.give_slot(slot)
    if (spent := time.perf_counter() - began) > _SHOWN_S:
        _log.info("kernels for a chain were made ready in %.1f s", spent)


def _steps(chain: ServedChain, slot: int, page: int) -> Iterator[Step]:
    """A page's worth of prompt, then a token twice: it is captured, then replayed."""
    longest = min(page, chain.context)
    for count in (longest, 1, 1):
        request = Request(
            id=_NOBODY,
            chain=chain,
            sampling=Sampling(max_tokens=1),
            salt=0,
            priority=0,
            opened_at=0.0,
            tokens=laid_out(chain, [0] * count, count)[:count],
            length=count,
            outputs=0,
            slot=slot,
        )
        yield Step(request, Span(0, 0, count), count)
