"""Text of variants: tokenizers, chat templates, streamed detokenization. The engine's only user of
`tokenizers`; it needs no torch.

The tokenizer is the variant's own tokenizer.json, with what tokenizer_config.json adds to it, as
transformers would load the two.
"""

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, processors

from engine.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from engine.errors import TextError
from engine.stops import StopFinder
from engine.template import ChatTemplate
from zoo.manifest import ObjectDigest, Variant
from zoo.store import Store

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
# Distinct sets of text files that stay in memory (variants of one base share one).
_KEPT = 32


class _AddedToken(msgspec.Struct, frozen=True):
    """An entry of `added_tokens_decoder`."""

    content: str
    lstrip: bool = False
    normalized: bool = True
    rstrip: bool = False
    single_word: bool = False
    special: bool = False


class _NamedTokens(msgspec.Struct, frozen=True):
    """The special tokens that have a name, as chat templates know them."""

    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None
    unk_token: str | _AddedToken | None = None
    sep_token: str | _AddedToken | None = None
    pad_token: str | _AddedToken | None = None
    cls_token: str | _AddedToken | None = None
    mask_token: str | _AddedToken | None = None


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class _Config(msgspec.Struct, frozen=True):
    """What tokenizer_config.json says beyond tokenizer.json."""

    chat_template: str | list[_NamedTemplate] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, _AddedToken] = {}


class _Decoder(msgspec.Struct, frozen=True):
    type: str
    decoders: list["_Decoder"] = []


class _TokenizerFile(msgspec.Struct, frozen=True):
    decoder: _Decoder | None = None


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's alphabet)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_of_character()


class VariantText:
    """The text side of one variant: encode prompts, render chats, decode answers."""

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, *, bytewise: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._special = frozenset[int]()
        self._bytewise = bytewise
        self._token_bytes: dict[int, bytes] = {}
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder().items()
            self._special = frozenset(number for number, token in added if token.special)

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be understood; without it only token ids can."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages can be rendered."""
        return self._template is not None

    def encode(self, prompt: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return self._need_tokenizer().encode(prompt, add_special_tokens=add_special_tokens).ids

    def render(self, messages: list[dict[str, Any]], template: dict[str, Any]) -> str:
        """The prompt for chat messages; `template` are further variables of the chat template."""
        if self._template is None:
            raise TextError("This model has no chat template: send a prompt instead of messages.")
        return self._template.render(messages, template)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids."""
        return self._need_tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token: int) -> str:
        """One token as it reads within a text; U+FFFD where it is a part of a character."""
        if self._bytewise:
            return self.token_bytes(token).decode("utf-8", "replace")
        # Decoded twice in a row: the second one keeps the leading space that the first may lose.
        once, twice = self.decode([token], False), self.decode([token, token], False)
        return twice[len(once) :]

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token of a byte-level vocabulary; none for an unknown id."""
        found = self._token_bytes.get(token)
        if found is None:
            text = self._need_tokenizer().id_to_token(token) or ""
            found = self._token_bytes[token] = _bytes_of(text)
        return found

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """A fresh detokenizer for an answer to `prompt`."""
        if self._bytewise:
            hidden = self._special if skip_special_tokens else frozenset[int]()
            return ByteDetokenizer(
                lambda token: b"" if token in hidden else self.token_bytes(token)
            )
        if self._tokenizer is None:
            return ByteDetokenizer(lambda _token: b"")
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens), prompt)

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise TextError(
                "This model has no tokenizer: send the prompt as token ids, without stop strings."
            )
        return self._tokenizer


class StreamPiece(msgspec.Struct, frozen=True, gc=False):
    """What some tokens add to an answer: text that may be shown, the stop string that ended it if
    one did, and how many of the tokens belong to the answer (all, unless it stopped)."""

    text: str
    stopped: str | None
    taken: int


class Stream:
    """The text of one answer while its tokens come in; nothing may be pushed after a stop.

    Stop strings do not count before `min_tokens` tokens.
    """

    def __init__(
        self,
        vt: VariantText,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        include_stop: bool,
        skip_special_tokens: bool,
        *,
        min_tokens: int = 0,
    ) -> None:
        if stop and not vt.has_tokenizer:
            raise TextError("This model has no tokenizer: use stop_token_ids instead of stop.")
        self._detokenizer = vt.detokenizer(prompt_ids, skip_special_tokens)
        self._stops = StopFinder(stop, include=include_stop)
        self._unchecked = min_tokens

    def push(self, token_ids: Iterable[int]) -> StreamPiece:
        """Take in tokens, up to the one that completes a stop string."""
        texts: list[str] = []
        taken = 0
        for token in token_ids:
            taken += 1
            text = self._detokenizer.push(token)
            if self._unchecked > 0:
                self._unchecked -= 1
                texts.append(text)
                continue
            text, stopped = self._stops.push(text)
            texts.append(text)
            if stopped is not None:
                return StreamPiece("".join(texts), stopped, taken)
        return StreamPiece("".join(texts), None, taken)

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        return self._stops.flush() + self._detokenizer.flush()


class Texts:
    """The text of every variant in a zoo, loaded when first asked for, equal files once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loaded: OrderedDict[tuple[ObjectDigest | None, ...], VariantText] = OrderedDict()

    def of(self, variant: Variant) -> VariantText:
        """The text side of `variant`. Raises TextError if its files are unusable."""
        key = tuple(variant.files.get(name) for name in _FILES)
        found = self._loaded.get(key)
        if found is None:
            found = self._loaded[key] = self._load(variant)
            while len(self._loaded) > _KEPT:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return found

    def _load(self, variant: Variant) -> VariantText:
        files = {
            name: self._store.blob(variant.files[name]) for name in _FILES if name in variant.files
        }
        try:
            config = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"), type=_Config)
            tokens = _named_tokens(files)
            tokenizer, bytewise = None, False
            if "tokenizer.json" in files:
                tokenizer = _tokenizer(files["tokenizer.json"], config, tokens)
                bytewise = _is_bytewise(files["tokenizer.json"])
        # The tokenizers library raises bare Exception for every fault of a file.
        except Exception as error:
            raise TextError(f"The tokenizer of {variant.name} cannot be read: {error}.") from error
        _give_back()
        source = _template_source(files, config)
        template = None if source is None else ChatTemplate(source, tokens)
        return VariantText(tokenizer, template, bytewise=bytewise)


def _give_back() -> None:
    """Give the heap's free memory back to the system: reading a vocabulary leaves more behind than
    the vocabulary takes. Only glibc has to be asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tokenizer(data: bytes, config: _Config, tokens: dict[str, str]) -> Tokenizer:
    """tokenizer.json with the tokens and the leading and trailing tokens that the config wants."""
    tokenizer = Tokenizer.from_buffer(data)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = sorted(config.added_tokens_decoder.items(), key=lambda item: int(item[0]))
    extra = [_added(token) for _, token in listed if token.content not in known]
    tokenizer.add_tokens(extra)  # pyright: ignore[reportUnknownMemberType]
    unknown = [text for text in tokens.values() if tokenizer.token_to_id(text) is None]
    tokenizer.add_special_tokens(unknown)  # pyright: ignore[reportUnknownMemberType]
    if config.add_bos_token is not None or config.add_eos_token is not None:
        first = tokens.get("bos_token") if config.add_bos_token else None
        last = tokens.get("eos_token") if config.add_eos_token else None
        _frame(tokenizer, first, last)
    return tokenizer


def _added(token: _AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _frame(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Begin and end every encoded text with these tokens."""
    ends = [text for text in (first, last) if text is not None]
    parts = [first, "$A", last]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in parts if part is not None],
        special_tokens=[(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(ends)],
    )


def _named_tokens(files: dict[str, bytes]) -> dict[str, str]:
    """bos_token, eos_token ...: tokenizer_config.json goes over special_tokens_map.json."""
    tokens: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        entries = msgspec.json.decode(files.get(file, b"{}"), type=_NamedTokens)
        for name in _NamedTokens.__struct_fields__:
            entry: str | _AddedToken | None = getattr(entries, name)
            if entry is not None:
                tokens[name] = entry if isinstance(entry, str) else entry.content
    return tokens


def _template_source(files: dict[str, bytes], config: _Config) -> str | None:
    """chat_template.jinja, else the config's template, of several the one named "default"."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    if isinstance(config.chat_template, list):
        named = {entry.name: entry.template for entry in config.chat_template}
        return named.get("default")
    return config.chat_template


def _is_bytewise(data: bytes) -> bool:
    """Whether the decoder of a tokenizer.json only puts bytes together (GPT-2's scheme)."""
    decoder = msgspec.json.decode(data, type=_TokenizerFile).decoder
    if decoder is None:
        return False
    steps = decoder.decoders or [decoder]
    return [step.type for step in steps] == ["ByteLevel"]


def _bytes_of(token: str) -> bytes:
    """Bytes of a byte-level token; an added token that holds other characters stands for itself."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()
