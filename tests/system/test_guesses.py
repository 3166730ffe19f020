"""A server guesses ahead unless it is told not to; its answers are the same."""

import re

import pytest

from engine.client import Client
from ext.build import supported
from tests.system.running import running
from tests.workers.family_zoo import Family
from tests.workers.rounded import tokens


@pytest.mark.skipif(not supported(), reason="needs AVX2, FMA and F16C")
def test_a_server_guesses_ahead_and_counts_it(tmp_path):
    zoo = Family(tmp_path, "llama").zoo
    said, drafts, accepted = [], [], []
    for flags in (["--num-speculative-tokens", "0"], ["--vllm-metrics"]):
        with (
            running(zoo, "--kv-cache-memory-bytes", str(64 << 20), *flags) as engine,
            Client(engine.zmq) as client,
        ):
            said.append(
                [
                    client.complete(
                        "base", tokens(4, n) * 6, max_tokens=60, temperature=0, ignore_eos=True
                    ).token_ids
                    for n in range(4)
                ]
            )
            engine.settled()
            told = client.metrics()
        drafts.append(counted(told, "blockllm_spec_decode_num_draft_tokens_total"))
        accepted.append(counted(told, "blockllm_spec_decode_num_accepted_tokens_total"))
    assert counted(told, "vllm:spec_decode_num_draft_tokens_total") == drafts[1]
    assert said[0] == said[1]
    assert drafts[0] == accepted[0] == 0
    assert drafts[1] >= accepted[1]
    assert drafts[1] > 0


def counted(metrics: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    assert found is not None, metrics
    return float(found[1])
