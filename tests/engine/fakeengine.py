"""An engine that speaks `engine.api` and runs no model: it answers by what the prompt asks for.

The answer to the prompt `say WORDS` is those words, a token each; `hang` gives one token and then
nothing; `reject REASON` is rejected; `break` fails after two tokens; anything else is echoed. Token
ids are code points of a text. It runs in a thread of its own and remembers every request.
"""

import threading
from collections.abc import Iterator
from typing import Any, Self

import msgspec
import zmq

from engine import api

FINGERPRINT = "f" * 64
APPROXIMATION = api.Approximation("delta", 0.97, 0.95, 0.02, 4096)
CONTEXT = 100
KEY = "secret"


class FakeEngine:
    """Serves one model, "tiny", at `endpoint` while it is entered."""

    def __init__(self, *, key: str = "", endpoint: str = "tcp://127.0.0.1:*") -> None:
        self._key = key
        self._bind = endpoint
        self.endpoint = ""
        self.seen: list[api.Request] = []
        self.state = "ready"
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._listening = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the socket as a killed process would."""
        self._stop.set()
        self._thread.join(10)

    def cancelled(self, timeout_s: float = 10.0) -> bool:
        """Wait until a Cancel comes."""
        return self.saw(api.Cancel, timeout_s)

    def saw(self, kind: type, timeout_s: float = 10.0, count: int = 1) -> bool:
        """Wait until that many requests of a kind have come."""

        def enough() -> bool:
            return sum(isinstance(request, kind) for request in self.seen) >= count

        with self._changed:
            return self._changed.wait_for(enough, timeout_s)

    def submits(self) -> list[api.Submit]:
        """The Submits so far."""
        return [request for request in self.seen if isinstance(request, api.Submit)]

    def _serve(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.set_hwm(0)
        socket.bind(self._bind)
        self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._listening.set()
        while not self._stop.is_set():
            if not socket.poll(20):
                continue
            peer, protocol, body = socket.recv_multipart()
            assert protocol == api.PROTOCOL
            request = api.decode_request(body)
            with self._changed:
                self.seen.append(request)
                self._changed.notify_all()
            for reply in self._replies(request):
                socket.send_multipart([peer, api.PROTOCOL, api.encode(reply)])
        socket.close(linger=0)
        context.term()

    def _replies(self, request: api.Request) -> Iterator[api.Reply]:
        match request:
            case api.Cancel():
                return
            case api.GetMetrics():
                yield api.MetricsReply(request.id, "# TYPE up gauge\nup 1\n")
                return
            case api.GetStatus():
                status = {"state": self.state, "ready": self.state == "ready", "version": "1.2.3"}
                yield api.StatusReply(request.id, status)
                return
            case _ if self._key and request.api_key != self._key:
                yield api.Rejected(request.id, "unauthorized", "Give a valid API key.")
            case api.ListModels():
                yield api.Models(request.id, [MODEL])
            case _ if request.model != "tiny":
                yield api.Rejected(
                    request.id, "not_found", f"There is no model {request.model}.", "model"
                )
            case api.Submit():
                yield from _answer(request)
            case api.Tokenize():
                text = request.prompt if request.prompt is not None else _chat(request.messages)
                yield api.Tokenized(request.id, spell(text), CONTEXT)
            case api.Detokenize():
                yield api.Detokenized(request.id, "".join(map(chr, request.tokens)))


MODEL = api.Model(
    id="tiny",
    created=1,
    parent=None,
    root="tiny",
    kind="base",
    family="llama",
    context=CONTEXT,
    fingerprint=FINGERPRINT,
    residency="loaded",
    has_chat_template=True,
)


def spell(text: str) -> list[int]:
    """Token ids of a text."""
    return [ord(character) for character in text]


def _chat(messages: list[dict[str, Any]] | None) -> str:
    contents = [message["content"] for message in messages or []]
    return "".join(
        content if isinstance(content, str) else content[0]["text"] for content in contents
    )


def _answer(request: api.Submit) -> Iterator[api.Reply]:
    text = request.prompt if request.prompt is not None else _chat(request.messages)
    ids = spell(text) if isinstance(text, str) else text
    text = "".join(map(chr, ids))
    command, _, rest = text.partition(" ")
    if command == "reject":
        reason = msgspec.convert(rest, api.Reason)
        yield api.Rejected(request.id, reason, f"Rejected as {reason}.", "prompt", 1.5)
        return
    words = (rest if command == "say" else text).split(" ")
    sampling = request.sampling
    if sampling.max_tokens is not None:
        words = words[: sampling.max_tokens]
    approximation = APPROXIMATION if command == "approximate" else None
    yield api.Accepted(request.id, request.model, FINGERPRINT, ids, approximation)
    for number, word in enumerate(words):
        piece = word if number == 0 else " " + word
        scores = None if sampling.logprobs is None else [_logprob(piece, sampling.logprobs)]
        prompt = None
        if number == 0 and sampling.prompt_logprobs is not None:
            prompt = [None, *(_logprob(chr(token), sampling.prompt_logprobs) for token in ids[1:])]
        yield api.Tokens(request.id, number, [number + 10], piece, scores, prompt)
        if command == "hang":
            return
        if command == "break" and number == 1:
            yield api.Rejected(request.id, "failed", "A worker died.")
            return
    yield api.Finished(
        request.id, len(words), "stop", "", len(ids), len(words), min(2, len(ids)), FINGERPRINT
    )


def _logprob(text: str, best: int) -> api.Logprob:
    top = tuple((number, f"t{number}", -1.0 - number) for number in range(best))
    return api.Logprob(ord(text[-1]), text, -0.5, 1, top)
