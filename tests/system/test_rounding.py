"""A server that rounds weights and pages: it serves, in less memory, and every answer says so."""

import json
import urllib.request

import pytest

from tests.system.running import running
from tests.workers.family_zoo import Family

FLAGS = ("--weights", "int8", "--kv-cache-dtype", "bfloat16", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return Family(tmp_path_factory.mktemp("rounding"), "llama")


def test_answers_and_status_say_what_is_rounded_and_how_far(family):
    told = {"store": "exact", "dtype": "bfloat16", "weights": "int8", "kv_cache": "bfloat16"}
    body = {"model": "base", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    with running(family.zoo, "--kv-cache-memory-bytes", str(64 << 20), *FLAGS) as engine:
        request = urllib.request.Request(
            f"{engine.http}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            reply = json.load(answer)
        assert reply["blockllm"]["approximation"] == told
        assert reply["usage"]["completion_tokens"] == 4
        status = engine.status()
    (variant,), (worker,) = status["variants"], status["workers"]
    assert variant["approximation"] == told
    assert 0 < variant["weight_error"] < 0.01
    assert (worker["weights"], worker["kv_dtype"]) == ("int8", "bfloat16")
    assert worker["dtype"] == "bfloat16"
    log = "".join(engine.log)
    assert "linear layers are kept in int8 (--weights) and KV pages hold bfloat16" in log
    assert "its weights are off by 0." in log
