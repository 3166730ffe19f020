"""The zoos that the scenarios serve, made once per base model and kept in `<home>/bench`.

    plain   the base alone
    loras   the base and eight LoRA adapters on all projections: four of rank 8, four of rank 16
    whole   the same, seven fine-tunes of the last four layers, one full fine-tune
    lasts   the base and seven fine-tunes of the last four layers
    fulls   the base and seven full fine-tunes
    tuned   the base and seven full fine-tunes that were really trained, stored in one of three ways
    many    the base, eight LoRA adapters, and seven full fine-tunes that were really trained, exact
    adding  the base and one variant of each kind that a server is given while it serves
    derived the base and what was made of it: surrogates, joined chains
    foreign the base, and its weights as an architecture that has no file of its own
    tiny    a model of four narrow layers with the base's vocabulary and variants of every kind, for
            what concerns the engine and not the arithmetic
    empty   nothing
    dummy-  shapes without weights, by what was asked for; these need no base

A zoo that was not finished is completed the next time: variants that are there are left alone.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from bench.tunes import Tunes
from bench.variants import Checkpoint, as_granite, full, last_layers, lora
from zoo import demo
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog, UnknownVariant
from zoo.dummy.make import make
from zoo.dummy.recipe import Recipe
from zoo.export import export
from zoo.home import zoo_path
from zoo.manifest import Variant
from zoo.progress import Progress, Quiet

BASE = "base"
LORAS = tuple(f"lora-r{8 if number < 4 else 16}-{number}" for number in range(8))
LAST = tuple(f"last-{number}" for number in range(7))
FULLS = tuple(f"full-{number}" for number in range(7))
FULL = "full"
TWIN = "twin"
_UPON_BASE = AddOptions(base=BASE)

Make = Callable[[Checkpoint, Path], Path]


class NoBase(Exception):
    """There is no base model to measure with; the message says how to get one."""


@dataclass(frozen=True, slots=True)
class Base:
    """The model that is measured: a transformers folder, or a variant of a zoo."""

    zoo: Path
    name: str

    @property
    def is_folder(self) -> bool:
        """Whether `name` is a folder and not a variant."""
        return Path(self.name).is_dir()

    def fingerprint(self) -> str:
        """A short name for its content. Raises NoBase."""
        if self.is_folder:
            files = sorted(path for path in Path(self.name).iterdir() if path.is_file())
            listing = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
            return hashlib.sha256(repr(listing).encode()).hexdigest()[:12]
        try:
            with closing(Catalog(self.zoo)) as catalog:
                return catalog.variant(self.name).chain[:12]
        except UnknownVariant as error:
            raise NoBase(
                f"the zoo {self.zoo} has no variant {self.name!r} to measure with: run "
                "`python -m zoo demo`, or give --base with a transformers folder or a variant"
            ) from error

    @contextmanager
    def checkpoint(self) -> Iterator[Checkpoint]:
        """Its weights as a transformers folder."""
        if self.is_folder:
            yield Checkpoint(Path(self.name))
            return
        with tempfile.TemporaryDirectory(prefix="blockllm-bench-") as scratch:
            yield Checkpoint(export(self.zoo, self.name, Path(scratch, "base"), Quiet()))


def demo_base(zoo: Path, progress: Progress) -> Base:
    """The demo's base model: that of `zoo` if it is there, else one in a zoo made here.
    Raises a ZooError if it cannot be had."""
    found = Base(zoo, demo.BASE)
    with suppress(NoBase):
        found.fingerprint()
        return found
    own = Base(zoo_path().parent / "bench" / "zoo", demo.BASE)
    try:
        own.fingerprint()
    except NoBase:
        demo.add_base(own.zoo, progress)
    return own


class Zoos:
    """Makes zoos when they are first wanted."""

    def __init__(self, base: Base, progress: Progress) -> None:
        self._base = base
        self._progress = progress

    @cached_property
    def _home(self) -> Path:
        return self.room / self._base.fingerprint()

    @property
    def room(self) -> Path:
        """Where benches keep what they make."""
        return zoo_path().parent / "bench"

    @property
    def given(self) -> Path:
        """The zoo that the base was named in, with whatever it holds."""
        return self._base.zoo

    @cached_property
    def plain(self) -> Path:
        """The base alone."""
        return self._fill("plain", {BASE: _itself})

    @cached_property
    def loras(self) -> Path:
        """The base and eight LoRA adapters."""
        return self._fill("loras", {BASE: _itself} | loras())

    @cached_property
    def whole(self) -> Path:
        """The base and a variant of every kind."""
        tuned: dict[str, Make] = {FULL: lambda base, to: full(base, to, seed=0)}
        return self._fill("whole", {BASE: _itself} | loras() | lasts() | tuned)

    @cached_property
    def lasts(self) -> Path:
        """The base and seven fine-tunes of the last four layers."""
        return self._fill("lasts", {BASE: _itself} | lasts())

    @cached_property
    def fulls(self) -> Path:
        """The base and seven full fine-tunes."""
        return self._fill("fulls", {BASE: _itself} | fulls())

    def tuned(self, store: str, rows: int) -> Path:
        """The base and seven real full fine-tunes, stored that way and measured on so many rows.
        Raises a ZooError."""
        made = {BASE: _itself} | Tunes(self._home / "tunes", self.progress).makes()
        options = AddOptions(base=BASE, store=store, rows=rows)
        return self._fill(f"tuned-{store}-{rows}", made, options)

    @cached_property
    def many(self) -> Path:
        """The base, eight adapters and seven real full fine-tunes, kept exactly. Raises a
        ZooError."""
        tunes = Tunes(self._home / "tunes", self.progress).makes()
        return self._fill("many", {BASE: _itself} | loras() | tunes)

    @cached_property
    def adding(self) -> Path:
        """The base, an adapter, one fine-tune of the last layers and a real one of everything."""
        made = Tunes(self._home / "tunes", self.progress).makes()
        names = (LORAS[-1], LAST[0], "tickets-0")
        return self._fill(
            "adding", {BASE: _itself} | {n: (loras() | lasts() | made)[n] for n in names}
        )

    @cached_property
    def derived(self) -> Path:
        """The base, for models that are made of it; what was made stays."""
        return self._fill("derived", {BASE: _itself})

    @cached_property
    def foreign(self) -> Path:
        """The base twice: through our own layers, and through transformers'."""
        return self._fill("foreign", {BASE: _itself, TWIN: as_granite}, AddOptions())

    @property
    def progress(self) -> Progress:
        """Where long jobs show how far they are."""
        return self._progress

    @cached_property
    def tiny(self) -> Path:
        """A very small model and its variants."""
        made: dict[str, Make] = {
            BASE: _itself,
            "lora-4": lambda base, to: lora(base, to, rank=4, seed=1),
            "lora-8": lambda base, to: lora(base, to, rank=8, seed=2),
            "last": lambda base, to: last_layers(base, to, layers=1, seed=3),
            "full": lambda base, to: full(base, to, seed=4),
        }
        return self._fill("tiny", made, shrink=True)

    @cached_property
    def empty(self) -> Path:
        """A folder that is no zoo yet."""
        return self._home / "empty"

    def dummy(self, recipe: Recipe) -> Path:
        """Shapes without weights. Raises a ZooError."""
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()
        root = self.room / f"dummy-{digest[:12]}"
        root.parent.mkdir(parents=True, exist_ok=True)
        make(root, recipe, self._progress)
        return root

    @property
    def fingerprint(self) -> str:
        """A short name for the base's content."""
        return self._base.fingerprint()

    def checkpoint(self) -> AbstractContextManager[Checkpoint]:
        """The base as a transformers folder."""
        return self._base.checkpoint()

    @property
    def log(self) -> Path:
        """Where servers write their log."""
        self._home.mkdir(parents=True, exist_ok=True)
        return self._home / "server.log"

    def _fill(
        self,
        name: str,
        made: dict[str, Make],
        options: AddOptions = _UPON_BASE,
        *,
        shrink: bool = False,
    ) -> Path:
        root = self._home / name
        missing = made.keys() - {variant.name for variant in variants(root)}
        if not missing:
            return root
        with self._base.checkpoint() as given, tempfile.TemporaryDirectory() as scratch:
            base = _shrunk(given, Path(scratch, "shrunk")) if shrink else given
            wanted = [one for one in made if one in missing]
            for variant in self._progress.track(wanted, f"making the zoo {name}"):
                source = made[variant](base, Path(scratch, variant))
                how = AddOptions() if variant == BASE else options
                add(root, variant, str(source), how, Quiet())
                if source != base.folder:
                    shutil.rmtree(source)
        return root


def variants(root: Path) -> list[Variant]:
    """What a zoo holds."""
    with closing(Catalog(root)) as catalog:
        return catalog.variants()


def _itself(base: Checkpoint, target: Path) -> Path:
    del target
    return base.folder


def loras() -> dict[str, Make]:
    """Eight adapters on all projections."""
    return {
        name: lambda base, to, rank=8 if seed < 4 else 16, seed=seed: lora(
            base, to, rank=rank, seed=seed
        )
        for seed, name in enumerate(LORAS)
    }


def lasts() -> dict[str, Make]:
    """Seven fine-tunes of the last four layers."""
    return {
        name: lambda base, to, seed=seed: last_layers(base, to, layers=4, seed=seed)
        for seed, name in enumerate(LAST)
    }


def fulls() -> dict[str, Make]:
    """Seven fine-tunes of everything."""
    return {
        name: lambda base, to, seed=seed: full(base, to, seed=seed)
        for seed, name in enumerate(FULLS)
    }


def _shrunk(base: Checkpoint, target: Path) -> Checkpoint:
    """A random Llama of four layers of 64, with the tokenizer and vocabulary of `base`."""
    given = AutoConfig.from_pretrained(base.folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=given.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=given.bos_token_id,
            eos_token_id=given.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    shutil.copytree(base.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    model.save_pretrained(target)
    return Checkpoint(target)
