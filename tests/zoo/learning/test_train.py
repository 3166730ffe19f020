"""Training on a tiny random model: the loss falls and what is saved loads again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.builders import tiny_llama
from zoo.errors import BadSource
from zoo.learning.evaluate import compare
from zoo.learning.practice import Row
from zoo.learning.tasks import TASKS, Recipe, Task
from zoo.learning.train import encode, fit, freeze_all_but_last, load, plan_batches, train
from zoo.progress import Quiet

LORA = Recipe("lora", 4, 1e-2, batch=4, rank=2, alpha=4, targets=("q_proj", "down_proj"))
FULL = Recipe("full", 8, 5e-3, batch=4)
LAST = Recipe("last", 4, 1e-2, batch=4, layers=1)


def short(recipe: Recipe) -> Task:
    return replace(TASKS["dates"], instruction="{prompt}", recipe=recipe, answer_tokens=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one thread, all the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune of `base`."""
    out = tmp_path_factory.mktemp("tuned")
    train(short(FULL), base, out, None, Quiet())
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_the_answer_is_learned(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    example = encode(tokenizer, TASKS["dates"], Row("4 May 2020", "2020-05-04", "train"))
    assert tokenizer.decode(example.ids[example.answer :]) == "2020-05-04<|im_end|>"
    assert tokenizer.decode(example.ids[: example.answer]).endswith("<|im_start|>assistant\n")


def test_the_loss_falls(base: Path) -> None:
    task = short(FULL)
    model, tokenizer = load(base, task.recipe)
    rows = task.rows("train", None)
    batches = plan_batches([encode(tokenizer, task, row) for row in rows], task.recipe)
    losses = fit(model, batches, task.recipe)
    assert len(losses) == FULL.steps
    assert losses[-1] < 0.6 * losses[0]


def test_batches_are_planned_alike_and_hold_alike_lengths(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    task = TASKS["tickets"]
    examples = [encode(tokenizer, task, row) for row in task.rows("train", None)]
    batches = plan_batches(examples, replace(LORA, steps=100))
    assert batches == plan_batches(examples, replace(LORA, steps=100))
    assert len(batches) == 100
    spreads = [max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in batches]
    assert sum(spreads) / len(spreads) < 5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_saved_for_peft_and_runs_repeat(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    for out in ("one", "two"):
        train(short(LORA), base, tmp_path / out, None, Quiet())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "q_proj"]
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(model, str(tmp_path / "one"))
    ids = torch.arange(8)[None]
    with tuned.disable_adapter():
        before = tuned(input_ids=ids).logits
    assert not torch.equal(tuned(input_ids=ids).logits, before)


def test_a_last_layers_fine_tune_leaves_the_rest_bit_equal(base: Path, tmp_path: Path) -> None:
    train(short(LAST), base, tmp_path / "out", None, Quiet())
    before, after = weights(base), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed
    assert all(name.startswith("model.layers.3.") for name in changed)


def test_a_full_fine_tune_moves_every_matrix(base: Path, tuned: Path) -> None:
    before, after = weights(base), weights(tuned)
    matrices = [name for name, tensor in before.items() if tensor.dim() == 2]
    assert not any(torch.equal(before[name].bfloat16(), after[name]) for name in matrices)
    AutoTokenizer.from_pretrained(tuned)


def test_freezing_counts_layers_from_the_end(base: Path) -> None:
    model, _ = load(base, LAST)
    freeze_all_but_last(model, 2)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"2", "3"}


def test_base_and_variant_are_scored_on_the_same_questions(base: Path, tuned: Path) -> None:
    task = short(FULL)
    questions = task.questions(None, 6)
    comparison = compare(task, base, tuned, questions, Quiet())
    assert comparison.variant.loss < comparison.base.loss
    assert comparison.questions == tuple(questions)
    assert len(comparison.variant.answers) == 6


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match="is not a folder that transformers loads"):
        train(short(FULL), tmp_path, tmp_path / "out", None, Quiet())


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(BadSource, match="only 0 rows"):
        plan_batches([], LORA)
