"""The whole model that transformers and peft make of a source: what a new chain is compared with,
and what merges adapters that have no other way.

In float32, whatever a source is stored as, so that what is left between the two is rounding."""

import contextlib
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from zoo.errors import BadAdapter, BadCheckpoint
from zoo.sources.values import Numbers, read_values

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# A model of transformers, or one that peft has put an adapter on: their attributes differ.
AnyModel: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Expected:
    """What the `model` gives for some sequences, float32: per sequence logits [n, vocabulary] and,
    for each depth, what leaves the embedding and each layer but the last [n, hidden]."""

    model: AnyModel
    sequences: tuple[tuple[int, ...], ...]
    logits: "tuple[Tensor, ...]"
    hidden: "tuple[tuple[Tensor, ...], ...]"


def rebuild(
    files: Mapping[str, bytes], tensors: Mapping[str, Numbers], source: str
) -> "PreTrainedModel":
    """The model of a config.json and a checkpoint's tensors, in float32 and memory of its own;
    `source` is what a refusal calls it."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with tempfile.TemporaryDirectory() as folder, _hushed():
        (Path(folder) / "config.json").write_bytes(files["config.json"])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        weights = {
            name: torch.from_numpy(read_values(tensor))
            for name, tensor in tensors.items()
            if tensor.dtype in {"F32", "BF16", "F16"}
        }
        kind: AnyModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        try:
            model = kind.from_pretrained(
                None, config=config, state_dict=weights, dtype=torch.float32
            )
        except Exception as error:
            # transformers refuses models with errors of many types
            raise BadCheckpoint(f"transformers cannot load {source}: {_line(error)}") from error
    return model.eval()


def tune(model: "PreTrainedModel", folder: Path, source: str) -> AnyModel:
    """The model with peft's adapter of that folder on it; `source` is what a refusal calls it."""
    from peft import PeftModel

    with _hushed():
        try:
            return PeftModel.from_pretrained(model, str(folder)).eval()
        except Exception as error:
            # peft refuses adapters with errors of many types
            raise BadAdapter(f"peft cannot load {source}: {_line(error)}") from error


def run(model: AnyModel, sequences: Iterable[Sequence[int]]) -> Expected:
    """What the model computes for the sequences, each alone."""
    import torch

    asked: list[tuple[int, ...]] = []
    logits: list[Tensor] = []
    hidden: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), _hushed():
        for tokens in sequences:
            asked.append(tuple(tokens))
            try:
                given = model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True)
            except Exception as error:
                # whatever a model's own code raises
                raise BadCheckpoint(f"the source's own model cannot run: {_line(error)}") from error
            # Virtual tokens stand before those that were asked for.
            own = slice(-len(tokens), None)
            logits.append(given.logits[0, own].float())
            hidden.append(tuple(state[0, own].float() for state in given.hidden_states[:-1]))
    return Expected(model, tuple(asked), tuple(logits), tuple(hidden))


def in_float64(expected: Expected) -> Expected | None:
    """What the model gives with its matrices and sums in float64, None where it does not run so. It
    is float64 from then on."""
    try:
        return run(expected.model.double(), expected.sequences)
    except BadCheckpoint:
        return None


def import_libraries() -> None:
    """Import what a reference needs: seconds for which no lock need be held."""
    importlib.import_module("transformers")
    if importlib.util.find_spec("peft") is not None:
        importlib.import_module("peft")


def merge(tuned: AnyModel, source: str) -> "dict[str, Tensor]":
    """Merge peft's adapter into the weights it is on, and give them all by their names."""
    import torch

    base = tuned.get_base_model()
    head = base.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    # A tied head would take what is merged into the embedding, and the other way round.
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = False
    with _hushed():
        try:
            return dict(tuned.merge_and_unload().state_dict())
        except Exception as error:
            # peft says in many ways that a type cannot be merged
            reason = _line(error) or type(error).__name__
            raise BadAdapter(f"peft cannot merge {source}: {reason}") from error


@contextlib.contextmanager
def _hushed() -> Generator[None]:
    """No remarks and no bars of transformers and peft, which speak of training."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
