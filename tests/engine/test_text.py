"""Text: equal to what transformers makes of it, for every way that tokens may come."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.errors import TextError
from engine.text import Stream, Texts, VariantText
from tests.builders import tiny_tokenizer
from zoo.manifest import ChainDigest, ObjectDigest, Variant
from zoo.store import Store

TEXTS = [
    "plain words, and more",
    "  leading and  double  spaces ",
    "Grüße, naïve café ½ €",
    "日本語の文章。中文",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪",
    "e\u0301 combining a\u0308\u0323 marks",
    "",
    "tabs\tand\nnew\r\nlines",
    "\ufffd already replaced \ufffd\ufffd",
]


def variant(files: dict[str, ObjectDigest], name: str = "v") -> Variant:
    """A variant of which only the text files matter."""
    return Variant(
        name=name,
        chain=ChainDigest("0" * 64),
        family="llama",
        kind="base",
        store="exact",
        base=None,
        source="",
        created=0.0,
        hidden=1,
        vocabulary=1,
        context=1,
        dtype="F32",
        eos=(),
        files=files,
        tensors={},
        report={},
    )


def stored(root: Path, folder: Path) -> tuple[Texts, Variant]:
    """The files of a checkpoint folder as a variant in a store."""
    store = Store(root)
    files = {path.name: store.put_blob(path.read_bytes()) for path in folder.iterdir()}
    return Texts(store), variant(files)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(name="tiny", scope="module")
def _tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VariantText:
    texts, model = stored(tmp_path_factory.mktemp("zoo"), folder)
    return texts.of(model)


@pytest.fixture(name="fast", scope="module")
def _fast(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def byte_fallback() -> Tokenizer:
    """A tokenizer in the manner of Llama 2: pieces with a mark for spaces, bytes for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁the", "▁a", "the", "a", "n", "s", "▁日", "本"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(name="pieces", scope="module")
def _pieces(tmp_path_factory: pytest.TempPathFactory) -> VariantText:
    store = Store(tmp_path_factory.mktemp("zoo"))
    digest = store.put_blob(byte_fallback().to_str().encode())
    return Texts(store).of(variant({"tokenizer.json": digest}))


def streamed(vt: VariantText, ids: list[int], prompt: list[int], skip: bool, size: int) -> str:
    """The text of an answer whose tokens come `size` at a time."""
    stream = Stream(vt, prompt, (), False, skip)
    batches = [ids[start : start + size] for start in range(0, len(ids), size)]
    return "".join(stream.push(batch).text for batch in batches) + stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(
    text: str, tiny: VariantText, fast: PreTrainedTokenizerFast
) -> None:
    for special in (True, False):
        assert tiny.encode(text, special) == fast.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("text", TEXTS)
def test_streams_every_text_as_transformers_decodes_it(
    text: str, tiny: VariantText, fast: PreTrainedTokenizerFast
) -> None:
    ids = tiny.encode(text, False)
    for size in (1, 2, 3, 5, max(1, len(ids))):
        assert streamed(tiny, ids, [], False, size) == fast.decode(ids) == text


def test_streams_bytes_in_any_order_as_they_decode_whole(
    tiny: VariantText, fast: PreTrainedTokenizerFast
) -> None:
    dice = random.Random(3)
    for _ in range(2000):
        # Ids past the vocabulary too: models are often padded beyond their tokenizer.
        ids = [dice.randrange(330) for _ in range(dice.randrange(12))]
        skip = dice.random() < 0.5
        whole = fast.decode(ids, skip_special_tokens=skip)
        assert streamed(tiny, ids, [1, 2, 3], skip, 1) == whole
        assert tiny.decode(ids, skip) == whole


def test_streams_random_unicode_one_byte_at_a_time(tiny: VariantText) -> None:
    dice = random.Random(4)
    alphabet = "aé€日🙂\u0301\u200d\U0001f1e9"
    byte_ids = {tiny.token_bytes(number): number for number in range(320)}
    for _ in range(300):
        text = "".join(dice.choices(alphabet, k=8))
        ids = [byte_ids[bytes([byte])] for byte in text.encode()]
        assert streamed(tiny, ids, [], True, 1) == text
        shown = Stream(tiny, [], (), False, True)
        for number, token in enumerate(ids):
            piece = shown.push([token]).text
            assert "\ufffd" not in piece, f"half a character at token {number}"


def test_shows_what_is_left_of_a_broken_character_at_the_end(tiny: VariantText) -> None:
    byte_ids = {tiny.token_bytes(number): number for number in range(320)}
    stream = Stream(tiny, [], (), False, True)
    assert stream.push([byte_ids[b"\xf0"], byte_ids[b"\x9f"]]).text == ""
    assert stream.flush() == "\ufffd"


def test_byte_fallback_joins_characters_and_keeps_spaces(pieces: VariantText) -> None:
    byte_ids = {byte: byte + 3 for byte in range(256)}
    smile = [byte_ids[byte] for byte in "🙂".encode()]
    the, bare_the, space = 260, 262, 259
    prompt = [1, the]
    for size in (1, 2, 3):
        assert streamed(pieces, [the, *smile, the], prompt, True, size) == " the🙂 the"
        assert streamed(pieces, [bare_the, space, the], prompt, True, size) == "the  the"
    stream = Stream(pieces, prompt, (), False, True)
    assert [stream.push([token]).text for token in smile] == ["", "", "", "🙂"]


def test_byte_fallback_equals_the_difference_of_whole_texts(pieces: VariantText) -> None:
    dice = random.Random(6)
    spell = {byte: byte + 3 for byte in range(256)}
    words = [[259], [260], [261], [262], [264], [266]]
    characters = [[spell[byte] for byte in text.encode()] for text in "é€日🙂"]
    prompt = [1, 260, 261]
    before = pieces.decode(prompt, True)
    for _ in range(500):
        ids = [token for part in dice.choices(words + characters, k=8) for token in part]
        whole = pieces.decode(prompt + ids, True)[len(before) :]
        assert streamed(pieces, ids, prompt, True, 1) == whole


def test_a_run_of_broken_bytes_does_not_pile_up(pieces: VariantText) -> None:
    stream = Stream(pieces, [1, 260], (), False, True)
    shown = "".join(stream.push([0x80 + 3]).text for _ in range(100))
    assert len(shown) > 80
    assert set(shown) == {"\ufffd"}


def test_names_single_tokens(tiny: VariantText, pieces: VariantText) -> None:
    assert pieces.token_text(260) == " the"
    assert pieces.token_text(0xE4 + 3) == "\ufffd"
    ids = tiny.encode("a b", False)
    assert "".join(map(tiny.token_text, ids)) == "a b"
    assert tiny.token_text(100_000) == ""


def test_stop_strings_cross_token_borders(tiny: VariantText) -> None:
    ids = tiny.encode("one two three", False)
    for size in (1, 2, len(ids)):
        stream = Stream(tiny, [], ("e t",), False, True)
        shown, taken, stopped = "", 0, None
        for start in range(0, len(ids), size):
            piece = stream.push(ids[start : start + size])
            shown, taken, stopped = shown + piece.text, taken + piece.taken, piece.stopped
            if stopped:
                break
        assert (shown, stopped) == ("on", "e t")
        assert tiny.decode(ids[:taken], True).startswith("one t")
        assert not tiny.decode(ids[: taken - 1], True).startswith("one t")


def test_stop_strings_can_be_shown_and_wait_for_min_tokens(tiny: VariantText) -> None:
    ids = tiny.encode("x.x.x.", False)
    shown = Stream(tiny, [], (".",), True, True).push(ids)
    assert (shown.text, shown.stopped, shown.taken) == ("x.", ".", 2)
    late = Stream(tiny, [], (".",), False, True, min_tokens=3).push(ids)
    assert (late.text, late.stopped, late.taken) == ("x.x", ".", 4)


MESSAGES = [
    [{"role": "user", "content": 'Hi <b>&</b> "quotes" 日本'}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße"},
        {"role": "assistant", "content": "ok", "tool_calls": None},
        {"role": "user", "content": "again"},
    ],
]
LISTING = """{{ bos_token }}{% for m in messages %}
  {% if loop.first %}
[{{ m.role }}]
  {% endif %}
{{ m['content'] | trim }}{{ eos_token }}
{% endfor %}"""
BREAKING = """{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
{{ m | tojson }}{% endfor %}"""
COUNTING = """{% set ns = namespace(n=0) %}
{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"""
TRAINING = """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}{% endfor %}"""
TEMPLATES = [
    LISTING,
    BREAKING,
    COUNTING,
    TRAINING,
    "{{ messages | tojson(indent=2) }}{% if add_generation_prompt %}>{% endif %}",
    "{{ tools is none }} {{ extra | default('none') }} {{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", MESSAGES)
def test_renders_as_transformers_does(
    template: str, messages: list[dict[str, str]], folder: Path, tmp_path: Path
) -> None:
    fast = AutoTokenizer.from_pretrained(folder)
    fast.chat_template = template
    fast.save_pretrained(tmp_path / "model")
    texts, model = stored(tmp_path / "zoo", tmp_path / "model")
    for generate in (True, False):
        ours = texts.of(model).render(messages, {"add_generation_prompt": generate, "extra": "e"})
        theirs = fast.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, extra="e"
        )
        assert ours == theirs


def test_joins_text_parts(tiny: VariantText) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo<|im_end|>" in tiny.render([{"role": "user", "content": parts}], {})


def config_only(root: Path, folder: Path, **config: object) -> VariantText:
    """tokenizer.json with a tokenizer_config.json of one's own."""
    store = Store(root)
    files = {
        "tokenizer.json": store.put_blob((folder / "tokenizer.json").read_bytes()),
        "tokenizer_config.json": store.put_blob(json.dumps(config).encode()),
    }
    return Texts(store).of(variant(files))


def test_refuses_what_it_cannot_render(tiny: VariantText, folder: Path, tmp_path: Path) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    strict = config_only(
        tmp_path, folder, chat_template="{{ raise_exception('Roles must alternate!') }}"
    )
    broken = config_only(tmp_path, folder, chat_template="{{ messages[9].content + 1 }}")
    plain = config_only(tmp_path, folder)
    hello = [{"role": "user", "content": "x"}]
    with pytest.raises(TextError, match=r"messages\[0\].content must be"):
        tiny.render(picture, {})
    with pytest.raises(TextError, match="needs a role"):
        tiny.render([{"content": "x"}], {})
    with pytest.raises(TextError, match=r"refuses these messages: Roles must alternate!\."):
        strict.render(hello, {})
    with pytest.raises(TextError, match="refuses these messages"):
        broken.render(hello, {})
    with pytest.raises(TextError, match="no chat template"):
        plain.render(hello, {})
    with pytest.raises(TextError, match="does not compile"):
        config_only(tmp_path, folder, chat_template="{% if %}")


def test_templates_cannot_reach_python(folder: Path, tmp_path: Path) -> None:
    escape = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(TextError):
        config_only(tmp_path, folder, chat_template=escape).render([], {})


def test_frames_texts_as_the_config_asks(folder: Path, tmp_path: Path) -> None:
    framed = config_only(
        tmp_path,
        folder,
        add_bos_token=True,
        add_eos_token=True,
        bos_token="<|endoftext|>",
        eos_token={"content": "<|im_end|>"},
    )
    ids = framed.encode("x", True)
    assert framed.decode(ids, False) == "<|endoftext|>x<|im_end|>"
    assert framed.decode(framed.encode("x", False), False) == "x"


def test_adds_the_tokens_that_only_the_config_knows(folder: Path, tmp_path: Path) -> None:
    entry = {"content": "<|think|>", "special": True}
    vt = config_only(tmp_path, folder, added_tokens_decoder={"320": entry})
    assert vt.encode("<|think|>", False) == [320]
    assert streamed(vt, [320], [], True, 1) == ""
    assert streamed(vt, [320], [], False, 1) == "<|think|>"


def test_a_variant_without_a_tokenizer_still_takes_token_ids(tmp_path: Path) -> None:
    vt = Texts(Store(tmp_path)).of(variant({}))
    assert streamed(vt, [1, 2], [3], True, 1) == ""
    with pytest.raises(TextError, match="no tokenizer"):
        vt.encode("text", True)
    with pytest.raises(TextError, match="stop_token_ids"):
        Stream(vt, [1], ("x",), False, True)


def test_names_a_variant_whose_tokenizer_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for damaged in (b"{", b"{}", b"\xff"):
        files = {"tokenizer.json": store.put_blob(damaged)}
        with pytest.raises(TextError, match="tokenizer of bent cannot be read"):
            Texts(store).of(variant(files, name="bent"))


def test_loads_equal_files_once(folder: Path, tmp_path: Path) -> None:
    texts, model = stored(tmp_path, folder)
    assert texts.of(model) is texts.of(variant(dict(model.files), name="other"))


def test_imports_no_torch() -> None:
    probe = "import engine.text, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"
