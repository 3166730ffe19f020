"""A `.gguf` file as a source: read, dequantized and given transformers' names by transformers
itself.

What is stored is what `from_pretrained(..., gguf_file=...)` computes with, in the data type asked
for.
"""

import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import BadCheckpoint, ZooError
from zoo.families.family import Family
from zoo.families.registry import family_of
from zoo.sources.checkpoint import Checkpoint, design_of, read_eos
from zoo.sources.ggufhead import check_head
from zoo.sources.sidefiles import read_side_files
from zoo.sources.weights import SourceTensor

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def read_gguf(path: Path, dtype: str) -> Checkpoint:
    """Read a `.gguf` of a known family; `dtype` is a key of DTYPES. Raises a ZooError."""
    check_head(path)
    # transformers' own bar is of use on a terminal only.
    hush = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        with hush:
            return _load(path, dtype)
    except ZooError:
        raise
    except Exception as error:
        # the loader fails in many ways on damaged files
        reason = " ".join(str(error).split())
        raise BadCheckpoint(f"{path} cannot be read as GGUF: {reason}") from error


def _load(path: Path, dtype: str) -> Checkpoint:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = {"gguf_file": path.name}
    family = family_of(AutoConfig.from_pretrained(path.parent, **file).model_type)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=getattr(torch, dtype), output_loading_info=True, **file
    )
    model, loading = loaded
    weights = model.state_dict()
    tied = _is_tied(weights, family)
    for problem, verb in (("missing_keys", "lacks"), ("unexpected_keys", "holds an unknown")):
        # What is missing would have been made up at random.
        if loading[problem]:
            raise BadCheckpoint(f"{path} {verb} {min(loading[problem])!r}")
    model.config.tie_word_embeddings = tied
    # Converters of others go by the name of the class, which a .gguf file does not say.
    model.config.architectures = [type(model).__name__]
    # The weights are plain now; the mark of the packed ones would make transformers refuse to load
    # what export writes.
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    files = _side_files(model, tokenizer)
    if tied:
        weights = {name: weights[name] for name in weights if name != _head_name(family)}
    tensors = {name: _plain(weight, DTYPES[dtype]) for name, weight in weights.items()}
    return Checkpoint(
        str(path), family, design_of(family, model.config), tensors, files, read_eos(files)
    )


def _is_tied(weights: Mapping[str, "torch.Tensor"], family: Family) -> bool:
    tokens = f"{family.prefix}{family.embed['tokens']}.weight"
    return weights[_head_name(family)].data_ptr() == weights[tokens].data_ptr()


def _head_name(family: Family) -> str:
    return f"{family.head['head']}.weight"


def _side_files(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return read_side_files(Path(folder))


def _plain(weight: "torch.Tensor", dtype: str) -> SourceTensor:
    """A tensor's memory as it is; the view keeps it alive."""
    import torch

    view = weight.contiguous().view(torch.uint8).numpy().data
    return SourceTensor(dtype, tuple(weight.shape), view.cast("B"))
