"""A surrogate is served like any variant, nearer to the true chain than what costs nothing, and the
same however often its training was killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.builders import fine_tune
from tests.zoo.derived.conftest import MEASURE
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog
from zoo.derived.judgement import TRUE, accept, bigrams, lookup
from zoo.derived.subject import read_subject
from zoo.derived.surrogate import KIND, SurrogateFinding, SurrogateOptions, make_surrogate
from zoo.derived.training import Course
from zoo.door import offline
from zoo.errors import BadSource, NameTaken, UnknownVariant, UnsupportedOption
from zoo.export import export
from zoo.findings import Findings
from zoo.keeping.remove import remove
from zoo.progress import Quiet

COURSE = Course(steps=60, batch=8, rate=3e-3)
OPTIONS = SurrogateOptions(ratio=0.5, measure=MEASURE, course=COURSE)


@pytest.fixture(scope="module")
def made(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SurrogateFinding]:
    root = copytree(taught, tmp_path_factory.mktemp("made") / "zoo")
    return root, make_surrogate(root, "model", OPTIONS, Quiet())


def test_it_is_better_than_what_costs_nothing(made: tuple[Path, SurrogateFinding]) -> None:
    _, finding = made
    assert finding.weights <= 0.5
    quality, kept = finding.verdict.quality, finding.verdict.acceptance
    assert quality[TRUE].kl.value < 1e-6
    assert quality["surrogate"].kl.high < quality["untrained"].kl.low
    assert quality["untrained"].kl.value < quality["random"].kl.value
    assert quality["surrogate"].perplexity.value < quality["untrained"].perplexity.value
    assert kept["surrogate"].share > max(kept[o].share for o in ("untrained", "random", "bigram"))
    assert 0 < kept["surrogate"].run <= 4
    assert finding.losses[1] < finding.losses[0]


def test_nobody_trains_on_it_and_so_it_is_no_base(
    made: tuple[Path, SurrogateFinding], tmp_path: Path
) -> None:
    root = copytree(made[0], tmp_path / "zoo")
    export(root, "model", tmp_path / "model", Quiet())
    tuned = fine_tune(tmp_path / "tuned", tmp_path / "model", ["layers.3."])
    assert add(root, "tuned", str(tuned), AddOptions(), Quiet()).base == "model"
    for name in ("tuned", "model"):
        remove(root, name, wait_s=1, progress=Quiet())
    # Now the surrogate alone shares units with it: embedding and head.
    assert add(root, "tuned", str(tuned), AddOptions(), Quiet()).base is None


def test_it_shares_embedding_and_head_and_is_kept(made: tuple[Path, SurrogateFinding]) -> None:
    root, finding = made
    true, stand_in = read_subject(root, "model"), read_subject(root, finding.name)
    assert stand_in.variant.kind == KIND
    assert stand_in.variant.base == "model"
    assert stand_in.variant.golden is None
    assert (stand_in.digests[0], stand_in.digests[-1]) == (true.digests[0], true.digests[-1])
    assert not set(stand_in.digests[1:-1]) & set(true.digests)
    found = Findings(Catalog(root)).all(KIND, SurrogateFinding)
    assert list(found.values()) == [finding]
    assert not list((root / "work").iterdir())


def test_the_workers_run_what_transformers_loads(
    made: tuple[Path, SurrogateFinding], tmp_path: Path
) -> None:
    root, finding = made
    folder = export(root, finding.name, tmp_path / "out", Quiet())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode(), offline(root) as door:
        wanted = model(ids).logits[0]
        loaded = door.load(read_subject(root, finding.name).manifests)
        (given,) = loaded.logits([ids[0].tolist()])
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


_KILLED = """
import sys
from pathlib import Path
import torch
from zoo.derived import training
from zoo.equivalence.text import Measure
from zoo.derived.surrogate import SurrogateOptions, make_surrogate
from zoo.derived.training import Course
from zoo.progress import Quiet
torch.set_num_threads(1)
course = Course(steps=60, batch=8, rate=3e-3, save_every_s=0.0)
options = SurrogateOptions(ratio=0.5, measure=Measure(32, 16, 2000), course=course)
make_surrogate(Path(sys.argv[1]), "model", options, Quiet())
"""


def test_a_killed_training_goes_on_to_the_same_weights(
    made: tuple[Path, SurrogateFinding], root: Path
) -> None:
    """Killed with no warning once a checkpoint is there; the rest is done by another process."""
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(root)])
    deadline = time.monotonic() + 60
    while not list(root.glob("work/*/training.safetensors")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    said: list[str] = []

    class Told(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    options = replace(OPTIONS, course=replace(COURSE, save_every_s=0.0))
    finding = make_surrogate(root, "model", options, Told())
    assert any("going on after" in text for text in said)
    assert finding.chain == made[1].chain


def test_refusals_leave_nothing(root: Path, tmp_path: Path) -> None:
    before = [variant.name for variant in Catalog(root).variants()]
    with pytest.raises(UnknownVariant, match="no variant is called 'nobody'"):
        make_surrogate(root, "nobody", OPTIONS, Quiet())
    for ratio in (0.0, 1.0, 2.0):
        with pytest.raises(UnsupportedOption, match="--ratio"):
            make_surrogate(root, "model", replace(OPTIONS, ratio=ratio), Quiet())
    with pytest.raises(UnsupportedOption, match="--width"):
        make_surrogate(root, "model", replace(OPTIONS, width=1.5), Quiet())
    with pytest.raises(NameTaken):
        make_surrogate(root, "model", replace(OPTIONS, name="random"), Quiet())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b", "split": "train"}\n')
    with pytest.raises(BadSource, match="too little text"):
        make_surrogate(root, "model", replace(OPTIONS, data=(rows,)), Quiet())
    assert [variant.name for variant in Catalog(root).variants()] == before
    assert not (root / "work").exists()


def test_guesses_are_counted_against_the_true_answer() -> None:
    text = torch.tensor([[5, 6, 5, 6, 5, 7, 8, 8]])
    bigram = bigrams(text, 10)
    assert bigram([[5, 6, 7, 8]])[0].tolist() == [6, 5, 8, 8]
    found = accept(bigram, [[9, 5]], [[6, 5, 6, 7, 8]])
    assert found.tokens == 5
    assert found.share == pytest.approx(4 / 5)
    assert found.run == pytest.approx((3 + 2 + 1 + 0 + 1) / 5)
    repeated = lookup(bigram)([[5, 6, 9, 1, 5, 6]])[0].tolist()
    assert repeated[-1] == 9
