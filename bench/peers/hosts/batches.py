"""Computes batches with transformers and peft, in an environment of theirs.

Started by `bench.peers.hosted`, which writes one JSON object per line to its standard input,
`{"prompts": [[id, ..], ..], "models": [name, ..], "new": n}`, and reads one per batch: for each
request the seconds from the batch's arrival to each of its tokens. The first line says that the
models are loaded. Prompts of a batch have equal lengths, so nothing is padded. With --dummy weights
are random: the model's folder need hold a config.json only, and adapters are given as NAME=RANK.
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
    AutoConfig,
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
# Left to itself, continuous batching takes most of the machine's memory for its cache; of a GPU's
# it may.
_CACHE_BLOCKS, _BATCH_TOKENS = 64, 1024


class Clock(StoppingCriteria):
    """Notes when each step of `generate` ends, and stops nothing."""

    def __init__(self, began: float) -> None:
        self.times: list[float] = []
        self._began = began

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """One step has ended for all rows."""
        self.times.append(time.perf_counter() - self._began)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load(path: str, given: argparse.Namespace) -> Model:
    """A model that does not stop by itself."""
    dtype = getattr(torch, given.dtype)
    if given.dummy:
        torch.manual_seed(0)
        with torch.device(given.device):
            config = AutoConfig.from_pretrained(path)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(given.device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def static(model: Model, batch: Batch, began: float, **more: object) -> Times:
    """One batch, all rows from the first step to the last."""
    ids = torch.tensor(batch["prompts"], device=model.device)
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
    on_cpu = model.device.type == "cpu"
    caching = ContinuousBatchingConfig(
        num_blocks=_CACHE_BLOCKS if on_cpu else None,
        max_batch_tokens=_BATCH_TOKENS if on_cpu else None,
        allow_block_sharing=False,
    )
    answers = model.generate_batch(
        batch["prompts"],
        generation_config=config,
        continuous_batching_config=caching,
        record_timestamps=True,
        warmup=not on_cpu,
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
    base = load(given.model, given)
    folders = dict(pair.split("=", 1) for pair in given.variant)
    if given.mode == "static":
        return lambda batch, began: static(base, batch, began)
    if given.mode == "continuous":
        return lambda batch, began: continuous(base, batch, began)
    if given.mode == "whole":
        models = {"base": base} | {name: load(folder, given) for name, folder in folders.items()}
        return lambda batch, began: by_model(models, batch, began)
    mixed = with_adapters(base, folders, dummy=given.dummy)
    return lambda batch, began: static(mixed, batch, began, adapter_names=batch["models"])


def with_adapters(base: Model, adapters: dict[str, str], *, dummy: bool) -> Model:
    """The base with LoRA adapters: read from folders, or on all linear layers with random weights
    of a rank."""
    from peft import LoraConfig, PeftModel, get_peft_model

    first, *others = adapters
    if dummy:
        made = {
            name: LoraConfig(
                r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear",
                init_lora_weights=False, task_type="CAUSAL_LM",
            )
            for name, rank in adapters.items()
        }  # fmt: skip
        mixed = get_peft_model(base, made[first], adapter_name=first)
        for name in others:
            mixed.add_adapter(name, made[name])
    else:
        mixed = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
        for name in others:
            mixed.load_adapter(adapters[name], adapter_name=name)
    return mixed.eval()


def main() -> None:
    """Load, then answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=("static", "continuous", "mixed", "whole"))
    parser.add_argument("--model")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dummy", action="store_true")
    parser.add_argument(
        "--variant", action="append", default=[], help="NAME=FOLDER, or NAME=RANK with --dummy"
    )
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
