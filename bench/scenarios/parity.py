"""Tokens against the reference: every variant of the zoo that was given, greedy, float32, 64
tokens.

The prompts run in mixed batches of 32 over all variants, and some of them again alone. Each answer
is judged by the whole model in transformers (with peft for adapters), fed the tokens that were
emitted: a token is `wrong` where the model's best logit is ahead of it by at least 1e-3, and a
`near tie` where it is ahead by less."""

import asyncio
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from pydoc_data.topics import topics

import torch
import uvloop
from transformers import AutoModelForCausalLM

from bench.result import Result
from bench.stage import Stage
from engine.client import AsyncClient
from zoo.catalog import Catalog
from zoo.export import export
from zoo.manifest import Variant
from zoo.progress import Quiet

TOKENS, TOGETHER, TIE = 64, 32, 1e-3
Answer = tuple[str, list[int], list[int]]


def run(stage: Stage) -> Iterator[Result]:
    """One cell per variant."""
    zoo = stage.zoos.given
    with closing(Catalog(zoo)) as catalog:
        served = catalog.variants()
    count, alone = (4, 1) if stage.quick else (20, 3)
    asked = [(v.name, prompt) for v in served for prompt in prompts_for(v.name, count)]
    random.Random(0).shuffle(asked)
    again = [(v.name, prompt) for v in served for prompt in prompts_for(v.name, alone)]
    with stage.server(zoo) as server:
        stage.say(f"parity: {len(asked)} prompts in mixed batches of {TOGETHER}")
        mixed = uvloop.run(ask_all(server.endpoint, asked, TOGETHER))
        stage.say(f"parity: {len(again)} of them alone")
        single = uvloop.run(ask_all(server.endpoint, again, 1))
        merged = sum(block["merged_runs"] for block in server.status()["blocks"])
    with tempfile.TemporaryDirectory(prefix="blockllm-parity-") as scratch:
        for variant in served:
            stage.say(f"parity: judging {variant.name}")
            model = _reference(zoo, variant, Path(scratch))
            judged = [_judge(model, answer) for answer in mixed if answer[0] == variant.name]
            moved = [a for a in single if a[0] == variant.name and a not in mixed]
            yield _cell(variant, judged, len(moved), merged)


def _cell(variant: Variant, judged: list[tuple[int, int]], moved: int, merged: int) -> Result:
    wrong, ties = (sum(column) for column in zip(*judged, strict=True))
    return Result(
        scenario="parity",
        cell=variant.name,
        figures={
            "kind": variant.kind,
            "prompts": len(judged),
            "tokens": len(judged) * TOKENS,
            "wrong": wrong,
            "near ties": ties,
            "other answers alone": moved,
            "merged runs": merged,
        },
        checks={
            f"{variant.name}: tokens equal the model's": wrong == 0,
            f"{variant.name}: alone as in the mix": moved == 0,
            f"{variant.name}: batches merged variants": merged > 0,
        },
    )


def prompts_for(name: str, count: int) -> Iterator[str]:
    """Prompts for a variant: pieces of Python's own documentation, the same each time."""
    text = "\n".join(topics[key] for key in sorted(topics))
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


def _reference(zoo: Path, variant: Variant, scratch: Path) -> torch.nn.Module:
    """The variant as transformers and peft make it of what the zoo exports."""
    folder = export(zoo, variant.name, scratch / variant.name, Quiet())
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from peft import PeftModel

    assert variant.base is not None
    base = scratch / variant.base
    if not base.exists():
        export(zoo, variant.base, base, Quiet())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval()


def _judge(model: torch.nn.Module, answer: Answer) -> tuple[int, int]:
    """Tokens of an answer that are wrong, and those chosen at a near tie."""
    _, prompt, tokens = answer
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    behind = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return int((behind >= TIE).sum()), int(((behind > 0) & (behind < TIE)).sum())
