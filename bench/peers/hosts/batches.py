"""Computes batches with transformers and peft, in an environment of theirs.

Started by `bench.peers.hosted`, which writes one JSON object per line to its standard input,
`{"prompts": [[id, ..], ..], "models": [name, ..], "new": n}`, and reads one per batch: for each
request the seconds from the batch's arrival to each of its tokens. The first line says that the
models are loaded. Prompts of a batch have equal lengths, so nothing is padded.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

Batch = dict[str, Any]
Times = list[list[float]]
# transformers types these loosely.
Model = Any
Tensor = Any
# Left to itself, continuous batching takes most of the machine's memory for its cache.
_CACHE_BLOCKS, _BATCH_TOKENS = 64, 1024


class Clock(StoppingCriteria):
    """Notes when each step of `generate` ends, and stops nothing."""

    def __init__(self, began: float) -> None:
        self.times: list[float] = []
        self._began = began

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """One step has ended for all rows."""
        self.times.append(time.perf_counter() - self._began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(path: str, dtype: str) -> Model:
    """A model that does not stop by itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def static(model: Model, batch: Batch, began: float, **more: object) -> Times:
    """One batch, all rows from the first step to the last."""
    ids = torch.tensor(batch["prompts"])
    clock = Clock(began)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=batch["new"],
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **more,
    )
    return [clock.times] * len(ids)


def continuous(model: Model, batch: Batch, began: float) -> Times:
    """Continuous batching over a paged cache."""
    config = GenerationConfig(
        max_new_tokens=batch["new"], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    caching = ContinuousBatchingConfig(
        num_blocks=_CACHE_BLOCKS, max_batch_tokens=_BATCH_TOKENS, allow_block_sharing=False
    )
    answers = model.generate_batch(
        batch["prompts"],
        generation_config=config,
        continuous_batching_config=caching,
        record_timestamps=True,
        warmup=False,
    )
    return [[stamp - began for stamp in answer.timestamps] for answer in answers.values()]


def by_model(models: dict[str, Model], batch: Batch, began: float) -> Times:
    """A batch for each model, one after the other."""
    times: Times = [[] for _ in batch["prompts"]]
    for name in dict.fromkeys(batch["models"]):
        rows = [row for row, model in enumerate(batch["models"]) if model == name]
        part = {"prompts": [batch["prompts"][row] for row in rows], "new": batch["new"]}
        for row, row_times in zip(rows, static(models[name], part, began), strict=True):
            times[row] = row_times
    return times


def runner(given: argparse.Namespace) -> Callable[[Batch, float], Times]:
    """How batches are computed."""
    base = load(given.model, given.dtype)
    folders = dict(pair.split("=", 1) for pair in given.variant)
    if given.mode == "static":
        return lambda batch, began: static(base, batch, began)
    if given.mode == "continuous":
        return lambda batch, began: continuous(base, batch, began)
    if given.mode == "whole":
        models = {"base": base} | {
            name: load(folder, given.dtype) for name, folder in folders.items()
        }
        return lambda batch, began: by_model(models, batch, began)
    from peft import PeftModel

    names = list(folders)
    mixed = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        mixed.load_adapter(folders[name], adapter_name=name)
    mixed.eval()
    return lambda batch, began: static(mixed, batch, began, adapter_names=batch["models"])


def main() -> None:
    """Load, then answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("static", "continuous", "mixed", "whole"))
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--variant", action="append", default=[], help="NAME=FOLDER")
    given = parser.parse_args()
    # Libraries print to the standard output: it goes to the log, the answers to where it led.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    compute = runner(given)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        began = time.perf_counter()
        print(json.dumps({"times": compute(batch, began)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
