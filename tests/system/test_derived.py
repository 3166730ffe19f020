"""What is made of a model is served like any variant: a surrogate, a narrower one, and a chain of
two widths, in one batch with the model, with the tokens that the offline door finds."""

import asyncio
import random
from pathlib import Path

import pytest
import torch
import uvloop

from engine.answers import Completion
from engine.client import AsyncClient
from tests.builders import tiny_llama
from tests.system.running import running
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.derived.stitch import StitchOptions, make_stitch
from zoo.derived.surrogate import SurrogateOptions, make_surrogate
from zoo.derived.training import Course
from zoo.door import offline
from zoo.equivalence.chains import manifests_of
from zoo.equivalence.text import Measure
from zoo.progress import Quiet

NAMES = ("model", "half", "narrow", "joined")
NEW_TOKENS = 24
_MEASURE = Measure(length=32, held_out=4, train=64)
_COURSE = Course(steps=3, batch=4, rate=1e-3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly trained: what is served is the point, not what it says."""
    folder = tmp_path_factory.mktemp("derived")
    root = folder / "zoo"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add(root, "model", str(tiny_llama(folder / "model", initializer_range=0.1)), AddOptions(),
        Quiet())  # fmt: skip
    for name, ratio, width in (("half", 0.5, 1.0), ("narrow", 0.9, 0.75)):
        options = SurrogateOptions(ratio, width, measure=_MEASURE, course=_COURSE, name=name)
        make_surrogate(root, "model", options, Quiet())
    stitching = StitchOptions(measure=_MEASURE, course=_COURSE, name="joined")
    make_stitch(root, ("model", "narrow"), stitching, Quiet())
    torch.set_num_threads(threads)
    return root


def test_stand_ins_and_joined_chains_answer_beside_their_model(zoo: Path):
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 300) for _ in range(n)] for n in (3, 17, 60)]
    asked = [(name, prompt) for prompt in prompts for name in NAMES]

    async def ask() -> list[Completion]:
        async with AsyncClient(engine.zmq) as client, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    client.complete(
                        name, prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True
                    )
                )
                for name, prompt in asked
            ]
        return [task.result() for task in tasks]

    with running(zoo, "--kv-cache-memory-bytes", str(64 << 20)) as engine:
        answers = uvloop.run(ask())
        engine.settled()
        blocks = engine.status()["blocks"]
    catalog = Catalog(zoo)
    variants = {name: catalog.variant(name) for name in NAMES}
    with offline(zoo) as door:
        models = {name: door.load(manifests_of(catalog, variants[name])) for name in NAMES}
        wanted = door.generate([(models[name], prompt) for name, prompt in asked], NEW_TOKENS)
    assert [answer.token_ids for answer in answers] == wanted
    assert len({tuple(tokens) for tokens in wanted}) > len(prompts)
    for (name, _), answer in zip(asked, answers, strict=True):
        assert answer.fingerprint == variants[name].chain
    # The joined chain's lower layers are the model's own, and its upper ones the narrow one's.
    assert sum(block["merged_runs"] > 0 for block in blocks) >= 2
