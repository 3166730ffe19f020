"""Variants made by hand, piece by piece: manifests over a tiny base, and the same change made to
transformers' model."""

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from tests import builders
from zoo.adding.add import AddOptions, add
from zoo.catalog import Catalog, Publication
from zoo.compose import attachment_digest, chain_digest
from zoo.manifest import (
    Attachment,
    Bias,
    Bottleneck,
    Chain,
    Gain,
    InputGain,
    LowRank,
    Manifests,
    NormWeights,
    ObjectDigest,
    Piece,
    Prefix,
    SoftPrompt,
    TokenRows,
)
from zoo.progress import Quiet
from zoo.store import Store

# The modules of a layer by our roles, and what each half reads and adds: the module whose input is
# the stream and whose output is the normed one, and the module whose output is added.
ROLES = {
    "llama": {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    "gpt2": {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    "gpt_neox": {
        "qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
}  # fmt: skip
ROLES["qwen3"] = ROLES["gemma3"] = ROLES["llama"]
NORMS = {
    "llama": {("a", "norm"): "input_layernorm", ("m", "norm"): "post_attention_layernorm"},
    "gpt2": {("a", "norm"): "ln_1", ("m", "norm"): "ln_2"},
    "gpt_neox": {("a", "norm"): "input_layernorm", ("m", "mlp_norm"): "post_attention_layernorm"},
    "gemma3": {
        ("a", "norm"): "input_layernorm", ("a", "post_norm"): "post_attention_layernorm",
        ("m", "norm"): "pre_feedforward_layernorm",
        ("m", "post_norm"): "post_feedforward_layernorm",
        ("a", "q_norm"): "self_attn.q_norm", ("a", "k_norm"): "self_attn.k_norm",
    },
}  # fmt: skip
NORMS["qwen3"] = NORMS["llama"] | {
    ("a", "q_norm"): "self_attn.q_norm",
    ("a", "k_norm"): "self_attn.k_norm",
}
CURVES = {
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "none": lambda x: x,
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class Base:
    """A tiny base in a zoo of its own, and where its modules are."""

    def __init__(self, root: Path, family: str) -> None:
        self.family = family
        self.zoo = root / "zoo"
        self.checkpoint = getattr(builders, f"tiny_{family}")(root / "base")
        add(self.zoo, "base", str(self.checkpoint), AddOptions(), Quiet())
        self.store = Store(self.zoo)
        self.variant = Catalog(self.zoo).variant("base")
        catalog = Catalog(self.zoo)
        units = catalog.chain(self.variant.chain).units
        self.units = [(digest, catalog.unit(digest)) for digest in units]
        load = AutoModelForCausalLM.from_pretrained
        self.untouched = load(self.checkpoint, dtype=torch.float32).eval()

    def unit(self, layer: int, half: str) -> int:
        """The unit of a layer's half: "a" or "m"."""
        parallel = self.family == "gpt_neox"
        return 1 + layer if parallel else 1 + 2 * layer + (half == "m")

    def module(self, model: nn.Module, layer: int, name: str) -> nn.Module:
        stem = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
        return model.get_submodule(f"{stem.get(self.family, 'model.layers')}.{layer}.{name}")

    def put(self, tensor: Tensor) -> ObjectDigest:
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        return self.store.put_tensor(DTYPES[tensor.dtype], tuple(tensor.shape), data)


def weight_of(module: nn.Module) -> Tensor:
    """A linear's weight as [out, in], whichever way it lies."""
    transposed = type(module).__name__ == "Conv1D"
    return module.weight.data.t() if transposed else module.weight.data


class Tuned:
    """A variant on its way: each call adds a piece, and the same change to the reference."""

    def __init__(self, base: Base, name: str, seed: int = 0) -> None:
        self.base, self.name = base, name
        self.pieces: dict[int, list[Piece]] = defaultdict(list)
        self.edits: list[Callable[[nn.Module], None]] = []
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.vectors: Tensor | None = None
        self.added = 0
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 0.2, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype)

    # ---- pieces ---------------------------------------------------------------------------------

    def _place(self, layer: int, role: str) -> tuple[int, Callable[[nn.Module], nn.Module]]:
        if role == "head":
            return len(self.base.units) - 1, lambda model: model.get_output_embeddings()
        half = "a" if role in {"q", "k", "v", "qkv", "o"} else "m"
        name = ROLES[self.base.family][role]
        return self.base.unit(layer, half), lambda model: self.base.module(model, layer, name)

    def _shape(self, layer: int, role: str) -> tuple[int, int]:
        return tuple(weight_of(self._place(layer, role)[1](self.base.untouched)).shape)

    def low_rank(
        self, layer: int, role: str, rank: int = 4, dtype: torch.dtype = torch.float32
    ) -> "Tuned":
        out, width = self._shape(layer, role)
        a, b = self.random(rank, width, dtype=dtype), self.random(out, rank, dtype=dtype)
        unit, find = self._place(layer, role)
        self.pieces[unit].append(LowRank(role, self.base.put(a), self.base.put(b), rank, 0.5))

        def edit(model: nn.Module) -> None:
            weight_of(untied(model, find)).add_(0.5 * b.float() @ a.float())

        self.edits.append(edit)
        return self

    def tokens_low_rank(self, rank: int = 3, dtype: torch.dtype = torch.float32) -> "Tuned":
        rows, hidden = self.base.untouched.get_input_embeddings().weight.shape
        a, b = self.random(rank, rows, dtype=dtype), self.random(hidden, rank, dtype=dtype)
        self.pieces[0].append(LowRank("tokens", self.base.put(a), self.base.put(b), rank, 0.5))
        # The piece stands behind the embedding's scale, the model's table before it.
        change = 0.5 * (b.float() @ a.float()).t() / self.base.units[0][1].spec.scale
        self.edits.append(lambda model: own_embedding(model).weight.data.add_(change))
        return self

    def gain(self, layer: int, role: str) -> "Tuned":
        vector = 1 + self.random(self._shape(layer, role)[0])
        unit, find = self._place(layer, role)
        self.pieces[unit].append(Gain(role, self.base.put(vector)))
        self.edits.append(lambda model: weight_of(untied(model, find)).mul_(vector[:, None]))
        return self

    def input_gain(self, layer: int, role: str) -> "Tuned":
        vector = 1 + self.random(self._shape(layer, role)[1])
        unit, find = self._place(layer, role)
        self.pieces[unit].append(InputGain(role, self.base.put(vector)))
        self.edits.append(lambda model: weight_of(find(model)).mul_(vector))
        return self

    def bias(self, layer: int, role: str) -> "Tuned":
        vector = self.random(self._shape(layer, role)[0])
        unit, find = self._place(layer, role)
        self.pieces[unit].append(Bias(role, self.base.put(vector)))

        def edit(model: nn.Module) -> None:
            find(model).bias = nn.Parameter(vector.clone())

        self.edits.append(edit)
        return self

    def norm(self, layer: int, half: str, role: str) -> "Tuned":
        name = NORMS[self.base.family][half, role]
        own = self.base.module(self.base.untouched, layer, name)
        weight = own.weight.data + self.random(*own.weight.shape)
        bias = getattr(own, "bias", None)
        bias = None if bias is None else bias.data + self.random(*bias.shape)
        unit = self.base.unit(layer, half)
        put = self.base.put
        self.pieces[unit].append(
            NormWeights(role, put(weight), None if bias is None else put(bias))
        )

        def edit(model: nn.Module) -> None:
            norm = self.base.module(model, layer, name)
            norm.weight.data.copy_(weight)
            if bias is not None:
                norm.bias.data.copy_(bias)

        self.edits.append(edit)
        return self

    def bottleneck(self, layer: int, role: str, reads: str, activation: str = "relu") -> "Tuned":
        hidden = self._shape(layer, role)[0]
        down, up = self.random(6, hidden), self.random(hidden, 6)
        inner, outer = self.random(6), self.random(hidden)
        unit = self._place(layer, role)[0]
        put = self.base.put
        self.pieces[unit].append(
            Bottleneck(
                role, put(down), put(up), activation, reads, 0.7, put(inner), put(outer)
            )
        )  # fmt: skip
        half = "a" if role == "o" else "m"
        norms = NORMS[self.base.family]
        before = norms.get((half, "norm")) or norms[half, "mlp_norm"]
        after = norms.get((half, "post_norm")) or ROLES[self.base.family][role]

        def edit(model: nn.Module) -> None:
            seen: dict[str, Tensor] = {}

            def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
                seen.update(input=args[0], norm=output)

            def change(module: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
                z = {"output": y, "stream": seen["input"] + y, **seen}[reads]
                return y + 0.7 * (CURVES[activation](z @ down.t() + inner) @ up.t() + outer)

            self.base.module(model, layer, before).register_forward_hook(look)
            self.base.module(model, layer, after).register_forward_hook(change)

        self.edits.append(edit)
        return self

    def with_prefix(self, length: int) -> "Tuned":
        for unit, (_, manifest) in enumerate(self.base.units):
            spec = manifest.spec
            if spec.__struct_config__.tag == "attention":
                keys, values = (
                    self.random(length, spec.kv_heads, spec.head_dim, scale=1.0) for _ in range(2)
                )
                self.prefix.append((keys, values))
                put = self.base.put
                self.pieces[unit].append(Prefix(put(keys), put(values), length))
        return self

    def with_prompt(self, length: int) -> "Tuned":
        self.vectors = self.random(length, self.base.variant.hidden, scale=1.0)
        self.pieces[0].append(SoftPrompt(self.base.put(self.vectors), length))
        return self

    def token_rows(self, ids: Sequence[int], *, head: bool = True, tokens: bool = True) -> "Tuned":
        hidden = self.base.variant.hidden
        rows = self.random(len(ids), hidden, scale=0.5)
        known = self.base.put(torch.tensor(ids))
        wanted = {0: "tokens"} if tokens else {}
        wanted |= {len(self.base.units) - 1: "head"} if head else {}
        for unit, role in wanted.items():
            self.pieces[unit].append(TokenRows(role, known, self.base.put(rows)))

        def edit(model: nn.Module) -> None:
            embedding, output = own_embedding(model), model.get_output_embeddings()
            changed = [embedding] * tokens + [output] * head
            for module in (embedding, output):
                weight = module.weight.data
                beyond = max(0, max(ids) + 1 - len(weight))
                module.weight = nn.Parameter(torch.cat([weight, weight.new_zeros(beyond, hidden)]))
                if module in changed:
                    module.weight.data[torch.tensor(ids)] = rows

        self.edits.append(edit)
        self.added = max(0, max(ids) + 1 - self.base.variant.vocabulary) if head else 0
        return self

    # ---- the two sides --------------------------------------------------------------------------

    def manifests(self) -> Manifests:
        attachments = [
            Attachment(tuple(self.pieces[i])) if self.pieces.get(i) else None
            for i in range(len(self.base.units))
        ]
        named = [a and (attachment_digest(a), a) for a in attachments]
        virtual = len(self.prefix[0][0]) if self.prefix else 0
        virtual += 0 if self.vectors is None else len(self.vectors)
        return Manifests(self.base.units, named, self.base.variant.context - virtual)

    def publish(self) -> str:
        """Make it a variant of the zoo."""
        made = self.manifests()
        chain = Chain(tuple(d for d, _ in made.units), tuple(a and a[0] for a in made.attachments))
        variant = msgspec.structs.replace(
            self.base.variant,
            name=self.name,
            chain=chain_digest(chain),
            context=made.context,
            vocabulary=self.base.variant.vocabulary + self.added,
            base="base",
        )
        attachments = dict(a for a in made.attachments if a)
        publication = Publication(variant, chain, dict(made.units), attachments, {})
        Catalog(self.base.zoo, writable=True).publish(publication)
        return self.name

    def reference(self) -> "Reference":
        model = copy.deepcopy(self.base.untouched)
        for edit in self.edits:
            edit(model)
        return Reference(model, self.prefix, self.vectors)


class Reference:
    """The whole model with the variant's changes."""

    def __init__(
        self, model: nn.Module, prefix: list[tuple[Tensor, Tensor]], vectors: Tensor | None
    ) -> None:
        self._model, self._prefix, self._vectors = model, prefix, vectors

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 [n, vocabulary]."""
        ids = torch.tensor([list(tokens)])
        if self._vectors is not None:
            embeds = self._model.get_input_embeddings()(ids)
            embeds = torch.cat([self._vectors[None], embeds], 1)
            return self._model(inputs_embeds=embeds).logits[0, len(self._vectors) :]
        if self._prefix:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self._prefix):
                cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
            return self._model(ids, past_key_values=cache).logits[0]
        return self._model(ids).logits[0]


def own_embedding(model: nn.Module) -> nn.Module:
    """The model's input embedding, no longer tied to its head."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is output.weight:
        output.weight = nn.Parameter(output.weight.data.clone())
    return embedding


def untied(model: nn.Module, find: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A module of the model; if it is the head, no longer tied to the embedding."""
    own_embedding(model)
    return find(model)
