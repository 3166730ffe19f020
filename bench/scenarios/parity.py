"""Tokens and logits against the reference: every variant of the zoo that was given, greedy,
float32, 64 tokens.

The prompts run in mixed batches of 32 over all variants, and some of them again alone. Each answer
is judged by the whole model in transformers (with peft for adapters), fed the tokens that were
emitted: a token is `wrong` where the model's best logit is ahead of it by at least 1e-3, and a
`near tie` where it is ahead by less. The beginnings of one answer per variant then run as one
batch in this process, and each alone: `logits mixed` and `logits alone` are their departures, as
the golden check understands them, `bound` the largest that passes. What is stored approximately is
in the batches and is not judged.
"""

import asyncio
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import uvloop
from torch import Tensor, nn, tensor

from bench.prose import prose
from bench.reference import References
from bench.result import Result
from bench.stage import Stage
from engine.client import AsyncClient
from zoo.adding.golden import departure
from zoo.adding.reference import run as run_whole
from zoo.catalog import Catalog
from zoo.door import offline
from zoo.equivalence.chains import manifests_of
from zoo.manifest import Variant

TOKENS, TOGETHER, TIE = 64, 32, 1e-3
# Of one step of a worker: what fits runs at once.
_ROWS = 512
Answer = tuple[str, list[int], list[int]]


@dataclass(frozen=True, slots=True)
class _Said:
    """What the server answered in mixed batches and to one after the other, and how often blocks
    ran rows of several variants."""

    mixed: Sequence[Answer]
    alone: Sequence[Answer]
    merged: int

    def of(self, name: str) -> list[Answer]:
        """A variant's answers in mixed batches."""
        return [answer for answer in self.mixed if answer[0] == name]

    def moved(self, name: str) -> int:
        """How many of a variant's answers are others alone."""
        return sum(one[0] == name and one not in self.mixed for one in self.alone)


@dataclass(frozen=True, slots=True)
class _Ran:
    """The beginning of an answer, and its logits in a batch of all variants and alone."""

    tokens: list[int]
    mixed: Tensor
    alone: Tensor


def run(stage: Stage) -> Iterator[Result]:
    """One cell per variant of the zoo that was given."""
    return check(stage, stage.zoos.given, *((4, 1) if stage.quick else (20, 3)))


def check(stage: Stage, zoo: Path, count: int, alone: int) -> Iterator[Result]:
    """One cell per variant of a zoo: `count` prompts each in the mix, `alone` of them alone."""
    with closing(Catalog(zoo)) as catalog:
        served = catalog.variants()
    said = _said(stage, zoo, [variant.name for variant in served], (count, alone))
    exact = [variant for variant in served if variant.store == "exact"]
    stage.say(f"parity: logits of {len(exact)} variants in one batch")
    ran = _logits(zoo, exact, said)
    with tempfile.TemporaryDirectory(prefix="blockllm-parity-") as scratch:
        references = References(zoo, Path(scratch))
        for variant in exact:
            stage.say(f"parity: judging {variant.name}")
            yield _cell(variant, references.of(variant), said, ran[variant.name])


def _said(stage: Stage, zoo: Path, names: Sequence[str], counts: tuple[int, int]) -> _Said:
    asked, again = ([(n, p) for n in names for p in prompts_for(n, c)] for c in counts)
    random.Random(0).shuffle(asked)
    with stage.server(zoo) as server:
        stage.say(f"parity: {len(asked)} prompts in mixed batches of {TOGETHER}")
        mixed = uvloop.run(ask_all(server.endpoint, asked, TOGETHER))
        stage.say(f"parity: {len(again)} of them alone")
        single = uvloop.run(ask_all(server.endpoint, again, 1))
        merged = sum(block["merged_runs"] for block in server.status()["blocks"])
    return _Said(mixed, single, merged)


def _logits(zoo: Path, variants: Sequence[Variant], said: _Said) -> Mapping[str, _Ran]:
    """All variants in one step, as long as their number allows, and each alone."""
    length = max(2, _ROWS // len(variants))
    with closing(Catalog(zoo)) as catalog, offline(zoo) as door:
        models = {one.name: door.load(manifests_of(catalog, one)) for one in variants}
        tokens: dict[str, list[int]] = {}
        for name in models:
            _, prompt, answer = said.of(name)[0]
            tokens[name] = [*prompt, *answer][-length:]
        mixed = door.logits([(model, tokens[name]) for name, model in models.items()])
        return {
            name: _Ran(tokens[name], together, model.logits([tokens[name]])[0])
            for (name, model), together in zip(models.items(), mixed, strict=True)
        }


def _cell(variant: Variant, model: nn.Module, said: _Said, ran: _Ran) -> Result:
    name, answers = variant.name, said.of(variant.name)
    wrong, ties = (sum(counts) for counts in zip(*(_judge(model, a) for a in answers), strict=True))
    expected = run_whole(model, [ran.tokens])
    mixed, alone = (departure([logits], expected) for logits in (ran.mixed, ran.alone))
    moved = said.moved(name)
    return Result(
        scenario="parity",
        cell=name,
        figures={
            "kind": variant.kind,
            "prompts": len(answers),
            "tokens": len(answers) * TOKENS,
            "wrong": wrong,
            "near ties": ties,
            "other answers alone": moved,
            "merged runs": said.merged,
            "logits mixed": mixed.error,
            "logits alone": alone.error,
            "bound": mixed.bound,
        },
        checks={
            f"{name}: tokens equal the model's": wrong == 0,
            f"{name}: alone as in the mix": moved == 0,
            f"{name}: batches merged variants": said.merged > 0,
            f"{name}: logits are the model's, mixed and alone": mixed.passes and alone.passes,
        },
    )


def prompts_for(name: str, count: int) -> Iterator[str]:
    """Prompts for a variant: pieces of Python's own documentation, the same each time."""
    text = prose()
    chance = random.Random(name)
    for _ in range(count):
        start = chance.randrange(len(text) - 400)
        yield text[start : start + chance.randrange(20, 300)]


async def ask_all(endpoint: str, asked: Sequence[tuple[str, str]], at_once: int) -> list[Answer]:
    """Greedy answers of variants to prompts: name, prompt and `TOKENS` tokens of each."""
    gate = asyncio.Semaphore(at_once)

    async def ask(client: AsyncClient, name: str, prompt: str) -> Answer:
        async with gate:
            done = await client.complete(
                name, prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True
            )
        return name, done.prompt_token_ids, done.token_ids

    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(client, name, prompt)) for name, prompt in asked]
    return [task.result() for task in tasks]


def _judge(model: nn.Module, answer: Answer) -> tuple[int, int]:
    """Tokens of an answer that are wrong, and those chosen at a near tie."""
    _, prompt, tokens = answer
    (whole,) = run_whole(model, [[*prompt, *tokens]]).logits
    logits = whole[len(prompt) - 1 : -1]
    behind = logits.amax(1) - logits.gather(1, tensor(tokens)[:, None])[:, 0]
    return int((behind >= TIE).sum()), int(((behind > 0) & (behind < TIE)).sum())
