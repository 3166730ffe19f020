"""A zoo with a tiny model that was taught a little, so that there is something to lose."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest
import torch

from tests.builders import tiny_llama
from zoo.adding.add import AddOptions, add
from zoo.derived.publishing import Draft, publish, stored
from zoo.derived.subject import read_subject
from zoo.derived.training import Course, Training
from zoo.equivalence.text import Measure, read_corpus
from zoo.progress import Quiet

MEASURE = Measure(length=32, held_out=16, train=2000)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one thread, all the more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with "model": four layers that have seen the built-in text for a few seconds."""
    folder = tmp_path_factory.mktemp("taught")
    root = folder / "zoo"
    source = tiny_llama(folder / "llama", initializer_range=0.05)
    add(root, "random", str(source), AddOptions(), Quiet())
    subject = read_subject(root, "random")
    corpus = read_corpus(subject.store, subject.variant, (), MEASURE, 0)
    network = subject.network(torch.float32)
    for part in network.parts:
        for tensor in part.weights.values():
            tensor.requires_grad_()

    def loss(ids: torch.Tensor, step: int) -> torch.Tensor:
        del step
        logits = network.logits(ids)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    course = Course(steps=120, batch=12, rate=3e-3)
    training = Training(network.trained(), course, folder / "work")
    training.run(corpus.train, loss, "teaching", Quiet())
    assert training.losses[-1] < 0.8 * training.losses[0]
    draft = Draft(
        "model",
        "full",
        subject,
        lambda store: stored(store, network, "float32", Quiet()),
        (0, 1, 2, 3),
    )
    publish(root, draft, 1.0, Quiet())
    return root


@pytest.fixture
def root(taught: Path, tmp_path: Path) -> Path:
    """A copy of that zoo to write to."""
    return copytree(taught, tmp_path / "zoo")
