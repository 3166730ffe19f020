"""The HTTP process with plain HTTP: every path does what OpenAI's and vLLM's clients expect."""

import msgspec
import pytest

from engine import api
from tests.engine.fakeengine import APPROXIMATION, CONTEXT, FINGERPRINT, spell
from tests.engine.httpserver import Site


def ask(text: str) -> list[dict[str, str]]:
    """One user message."""
    return [{"role": "user", "content": text}]


def test_completes(site: Site) -> None:
    response = site.complete(prompt="say one two", max_tokens=5)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["system_fingerprint"] == FINGERPRINT
    assert body["choices"] == [
        {
            "index": 0,
            "text": "one two",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 2,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


def test_answers_a_chat(site: Site) -> None:
    body = site.chat("say hello", max_completion_tokens=3, n=2, seed=7).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["message"] == {
        "content": "hello",
        "role": "assistant",
        "refusal": None,
    }
    assert body["usage"]["prompt_tokens"] == 9
    assert body["usage"]["completion_tokens"] == 2
    submits = site.engine.submits()
    assert [submit.sampling.seed for submit in submits] == [7, 8]
    assert {submit.sampling.max_tokens for submit in submits} == {3}


def test_says_when_a_chain_is_not_exact(site: Site) -> None:
    told = {"approximation": msgspec.to_builtins(APPROXIMATION)}
    assert site.complete(prompt="approximate it").json()["blockllm"] == told
    assert site.chat("approximate it").json()["blockllm"] == told
    assert "blockllm" not in site.complete(prompt="say it").json()
    for path, asked in (
        ("/v1/completions", {"prompt": "approximate it"}),
        ("/v1/chat/completions", {"messages": ask("approximate it")}),
    ):
        *pieces, _ = site.events(path, **asked)
        assert all(piece["blockllm"] == told for piece in pieces)


def test_streams_a_completion(site: Site) -> None:
    *pieces, done = site.events("/v1/completions", prompt="say one two three")
    assert done == "[DONE]"
    assert [piece["choices"][0]["text"] for piece in pieces] == ["one", " two", " three", ""]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert "usage" not in pieces[0]
    assert len({piece["id"] for piece in pieces}) == 1


def test_streams_a_chat(site: Site) -> None:
    *pieces, usage, done = site.events(
        "/v1/chat/completions",
        messages=ask("say one two"),
        stream_options={"include_usage": True},
    )
    assert done == "[DONE]"
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    deltas = [piece["choices"][0]["delta"] for piece in pieces]
    assert deltas == [
        {"content": "", "role": "assistant"},
        {"content": "one"},
        {"content": " two"},
        {},
    ]
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None, None, None, "stop"]
    assert all(piece["usage"] is None for piece in pieces)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 13


def test_counts_tokens_along_the_stream(site: Site) -> None:
    *pieces, _, _ = site.events(
        "/v1/completions",
        prompt="say a b",
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert [piece["usage"]["completion_tokens"] for piece in pieces] == [1, 2, 2]
    assert {piece["usage"]["prompt_tokens"] for piece in pieces} == {7}


def test_streams_several_choices_at_once(site: Site) -> None:
    *pieces, done = site.events("/v1/completions", prompt=["say a b", "say x y"], n=2)
    assert done == "[DONE]"
    texts = dict.fromkeys(range(4), "")
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "a b", 1: "a b", 2: "x y", 3: "x y"}


@pytest.mark.parametrize(
    ("prompt", "submitted"),
    [
        ("say a", ["say a"]),
        (["say a", "say b"], ["say a", "say b"]),
        (spell("say a"), [spell("say a")]),
        ([spell("say a"), spell("say b")], [spell("say a"), spell("say b")]),
    ],
)
def test_takes_every_kind_of_prompt(site: Site, prompt: object, submitted: list[object]) -> None:
    body = site.complete(prompt=prompt).json()
    assert [choice["text"] for choice in body["choices"]] == ["a", "b"][: len(submitted)]
    assert [submit.prompt for submit in site.engine.submits()] == submitted
    assert site.engine.submits()[0].sampling.max_tokens == 16


def test_takes_text_parts(site: Site) -> None:
    parts = [{"type": "text", "text": "say hello"}]
    site.chat(parts)
    assert site.engine.submits()[0].messages == [{"role": "user", "content": parts}]


def test_hands_on_every_sampling_field(site: Site) -> None:
    fields = {
        "max_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 42,
        "stop": ["x", "y"],
        "stop_token_ids": [1],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "logit_bias": {"17": 1.5},
        "allowed_token_ids": [1, 2],
        "skip_special_tokens": False,
        "deadline_s": 9,
    }
    assert set(fields) == set(api.Sampling.__struct_fields__)
    extras = {"priority": -3, "user": "me", "cache_salt": "s", "unheard_of": 1}
    assert site.complete(prompt="say a", add_special_tokens=False, **fields, **extras).is_success
    (submit,) = site.engine.submits()
    sampling = {name: getattr(submit.sampling, name) for name in fields}
    assert sampling == fields | {
        "stop": ("x", "y"),
        "stop_token_ids": (1,),
        "allowed_token_ids": (1, 2),
        "logit_bias": {17: 1.5},
    }
    assert (submit.priority, submit.add_special_tokens) == (-3, False)


def test_nulls_mean_the_default(site: Site) -> None:
    assert site.complete(prompt="say a", temperature=None, stop=None, n=None, seed=None).is_success
    assert site.engine.submits()[0].sampling == api.Sampling(max_tokens=16)


def test_hands_on_template_variables(site: Site) -> None:
    site.chat("say a", chat_template_kwargs={"think": False}, add_generation_prompt=False)
    assert site.engine.submits()[0].template == {"think": False, "add_generation_prompt": False}


def test_shows_logprobs_of_a_completion(site: Site) -> None:
    body = site.complete(prompt="say one two", logprobs=1).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"one": -0.5, "t0": -1.0}, {" two": -0.5, "t0": -1.0}],
        "text_offset": [0, 3],
    }
    *pieces, _ = site.events("/v1/completions", prompt="say one two", logprobs=0)
    assert pieces[1]["choices"][0]["logprobs"] == {
        "tokens": [" two"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{" two": -0.5}],
        "text_offset": [3],
    }


@pytest.mark.parametrize("prompt", ["say one", spell("say one")])
def test_echoes_the_prompt_with_its_logprobs(site: Site, prompt: object) -> None:
    choice = site.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "say oneone"
    assert logprobs["tokens"] == [*"say one", "one"]
    assert logprobs["token_logprobs"][:2] == [None, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"a": -0.5, "t0": -1.0}]
    assert logprobs["text_offset"] == list(range(8))
    *pieces, _ = site.events("/v1/completions", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert pieces[0]["choices"][0]["text"] == "say oneone"
    assert pieces[0]["choices"][0]["logprobs"] == logprobs


def test_looks_at_a_prompt_only(site: Site) -> None:
    site.complete(prompt="say one", echo=True, max_tokens=0)
    sampling = site.engine.submits()[0].sampling
    assert (sampling.max_tokens, sampling.prompt_logprobs) == (0, 0)


def test_shows_logprobs_of_a_chat(site: Site) -> None:
    choice = site.chat("say é", logprobs=True, top_logprobs=1).json()["choices"][0]
    top = {"token": "t0", "logprob": -1.0, "bytes": [116, 48]}
    entry = {"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [top]}
    assert choice["logprobs"] == {"content": [entry]}
    pieces = site.events("/v1/chat/completions", messages=ask("say é"), logprobs=True)
    bare = entry | {"top_logprobs": []}
    assert pieces[1]["choices"][0]["logprobs"] == {"content": [bare]}


def test_shows_token_ids_and_prompt_logprobs(site: Site) -> None:
    choice = site.complete(prompt="hi", return_token_ids=True, prompt_logprobs=1).json()["choices"][
        0
    ]
    assert choice["token_ids"] == [10]
    assert choice["prompt_token_ids"] == [104, 105]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "t0"},
        },
    ]
    body = site.chat("hi", return_token_ids=True).json()
    assert body["prompt_token_ids"] == [104, 105]
    assert body["choices"][0]["token_ids"] == [10]


def test_lists_models(site: Site) -> None:
    body = site.http.get("/v1/models").json()
    (model,) = body["data"]
    assert body["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
    assert model["blockllm"]["fingerprint"] == FINGERPRINT
    assert site.http.get("/v1/models/tiny").json() == model
    missing = site.http.get("/v1/models/org/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_tokenizes_and_back(site: Site) -> None:
    body = site.http.post("/tokenize", json={"model": "tiny", "prompt": "ab"}).json()
    assert body == {"count": 2, "max_model_len": CONTEXT, "tokens": [97, 98]}
    body = site.http.post("/tokenize", json={"model": "tiny", "messages": ask("ab")}).json()
    assert body["tokens"] == [97, 98]
    body = site.http.post("/detokenize", json={"model": "tiny", "tokens": [97, 98]}).json()
    assert body == {"prompt": "ab"}
    assert site.http.post("/tokenize", json={"model": "tiny"}).status_code == 400


def test_tells_of_itself(site: Site) -> None:
    metrics = site.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "up 1" in metrics.text
    assert site.http.head("/metrics").status_code == 200
    assert site.http.get("/version").json() == {"version": "1.2.3"}
    assert site.http.get("/status").json()["state"] == "ready"
    assert "<html" in site.http.get("/").text


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("ready", 200, 200), ("draining", 200, 503), ("starting", 503, 503), ("recovering", 503, 503)],
)
def test_says_how_it_is(site: Site, state: str, health: int, ready: int) -> None:
    site.engine.state = state
    assert site.http.get("/health").status_code == health
    assert site.http.get("/ping").status_code == health
    assert site.http.get("/ready").status_code == ready
    if health == 200:
        assert site.http.get("/health").content == b""
    else:
        assert int(site.http.get("/health").headers["retry-after"]) >= 1


def test_repeats_request_ids(site: Site) -> None:
    for path in ("/health", "/nowhere"):
        assert site.http.get(path, headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert site.http.get("/health").headers["x-request-id"]


def test_every_path_is_documented(site: Site) -> None:
    document = site.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        wrong = "get" if "post" in operations else "post"
        url = path.replace("{name}", "tiny")
        assert site.http.request(wrong, url).status_code == 405
    schema = document["components"]["schemas"]["CompletionRequest"]
    assert set(schema["required"]) == {"model", "prompt"}
