"""Trains one variant of a base model on one task: a LoRA adapter, its last layers, or all of it.

Called by the command line and by the demo. The prompt goes through the chat template and only the
answer is learned. Seeded: the same rows, recipe and machine give the same weights.
"""

import ctypes
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zoo.errors import BadSource
from zoo.learning.practice import Row
from zoo.learning.tasks import Recipe, Task
from zoo.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LONGEST = 160
_POOL_BATCHES = 16
_CLIP_NORM = 1.0
_WARM_UP = 0.06
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a conversation; those from `answer` on are learned."""

    ids: tuple[int, ...]
    answer: int


def train(task: Task, base: Path, out: Path, data: Path | None, progress: Progress) -> None:
    """Train `task` on its training rows from the checkpoint folder `base` and save it as `out`.

    A LoRA recipe saves a PEFT adapter folder, others a whole transformers folder; both in bfloat16.
    Raises BadSource where the rows or the base are missing.
    """
    recipe = task.recipe
    rows = task.rows("train", data)
    torch.manual_seed(0)
    _keep_freed_memory()
    model, tokenizer = load(base, recipe)
    tuned = _with_adapter(model, recipe) if recipe.kind == "lora" else None
    if recipe.kind == "last":
        freeze_all_but_last(model, recipe.layers)
    batches = plan_batches([encode(tokenizer, task, row) for row in rows], recipe)
    losses = fit(model, progress.track(batches, f"training {task.name}"), recipe)
    progress.say(f"trained {task.name}: loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last")
    out.mkdir(parents=True, exist_ok=True)
    if tuned is not None:
        _save_adapter(tuned, out)
        return
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(base: Path, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready to train: frozen weights may stay bfloat16, others are float32.

    Eager attention: at a few dozen tokens its backward pass takes a CPU half the fused one's time.
    """
    dtype = "auto" if recipe.kind == "lora" and is_bfloat16_fast() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BadSource(f"{base} is not a folder that transformers loads: {reason}") from error
    return model, tokenizer


def _keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next one. By default glibc maps every large
    buffer anew, and faulting its pages in costs as much time as the training itself."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def is_bfloat16_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX); others emulate it slowly."""
    capabilities: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(capabilities().get("amx_bf16"))


def freeze_all_but_last(model: PreTrainedModel, layers: int) -> None:
    """Leave only the last `layers` layers to be trained; neither the final norm nor the head."""
    model.requires_grad_(requires_grad=False)
    stack = model.get_decoder().get_submodule("layers")
    for layer in list(stack.children())[-layers:]:
        layer.requires_grad_(requires_grad=True)


def _with_adapter(model: PreTrainedModel, recipe: Recipe) -> "PeftModel":
    """Freeze `model` and put fresh adapters into it; what is returned wraps the same model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers for names that transformers is about to drop; nothing of ours.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, row: Row) -> Example:
    """The row as a conversation that ends with the end-of-turn token."""
    asked = prompt_ids(tokenizer, task, row.prompt)
    answer = tokenizer.encode(row.response, add_special_tokens=False)
    return Example((*asked, *answer, end_of_turn(tokenizer)), len(asked))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, task: Task, prompt: str) -> list[int]:
    """Token ids of the chat up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        task.messages(prompt), tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(str(text), add_special_tokens=False)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer."""
    return cast("int", tokenizer.eos_token_id)


def plan_batches(examples: Sequence[Example], recipe: Recipe) -> list[list[Example]]:
    """As many batches as the recipe has steps, each of examples of similar length."""
    usable = [example for example in examples if len(example.ids) <= _LONGEST]
    if len(usable) < recipe.batch:
        raise BadSource(f"only {len(usable)} rows of at most {_LONGEST} tokens to train on")
    batches = _endless_batches(usable, recipe.batch)
    return [next(batches) for _ in range(recipe.steps)]


def _endless_batches(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    chance = random.Random(0)
    while True:
        order = chance.sample(examples, len(examples))
        for start in range(0, len(order), size * _POOL_BATCHES):
            pool = sorted(order[start : start + size * _POOL_BATCHES], key=lambda e: len(e.ids))
            batches = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            yield from chance.sample(batches, len(batches))


def fit(
    model: PreTrainedModel, batches: Iterable[Sequence[Example]], recipe: Recipe
) -> list[float]:
    """One AdamW step per batch, the rate rising briefly and then falling to zero; every loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0)
    warm_up = max(1, round(_WARM_UP * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1 - step / recipe.steps)
    )
    losses: list[float] = []
    model.train()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16_fast()):
            loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def answer_loss(model: PreTrainedModel, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; logits are computed for those alone."""
    width = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    learned = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        learned[row, example.answer : length] = True
    body, head = model.get_decoder(), model.get_output_embeddings()
    assert head is not None, "a causal model has a head"
    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = head(hidden[:, :-1][learned[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned[:, 1:]])


def _save_adapter(tuned: "PeftModel", out: Path) -> None:
    """Write the adapter in bfloat16; the config's lists are sorted: equal runs, equal files."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(tuned)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()},
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = tuned.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    config.inference_mode = True
    config.save_pretrained(str(out))
    path = out / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
