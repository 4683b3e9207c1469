"""The demo model over several ranks says what it says on one."""

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.e2e.prompts import PROMPTS

SPLIT = pytest.mark.feature("Parallelism and recovery", "Layers split over ranks")
DEALT = pytest.mark.feature("Parallelism and recovery", "Layers dealt over stages")
CHOSEN = (0, 5, 7, 12, 20)  # of the prompts


def answers(*flags: str) -> list[dict]:
    server = ServerProcess.start(
        *("--model", "demo", "--device", "cpu", "--data-type", "float32", "--max-length", "512", "--kv-cache-memory", "32MiB"),
        *flags,
    )
    try:
        found = []
        for number in CHOSEN:
            messages = [{"role": "user", "content": PROMPTS[number][0]}]
            body = {
                "model": "demo",
                "messages": messages,
                "temperature": 0,
                "max_tokens": 24,
                "logprobs": True,
                "top_logprobs": 3,
            }
            response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
            assert response.status_code == 200, response.text
            found.append(response.json()["choices"][0])
    finally:
        status = server.stop()
    assert status == 0
    return found


@pytest.fixture(scope="module")
def alone(demo) -> list[dict]:
    return answers()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--tensor-parallel", "2"), marks=SPLIT),
        pytest.param(("--tensor-parallel", "4"), marks=SPLIT),
        pytest.param(("--pipeline-parallel", "2"), marks=DEALT),
        pytest.param(("--tensor-parallel", "2", "--pipeline-parallel", "2"), marks=[SPLIT, DEALT]),
    ],
    ids=" ".join,
)
def test_ranks_together_say_what_one_says(flags, alone):
    for ours, theirs in zip(answers(*flags), alone, strict=True):
        assert ours["message"] == theirs["message"]
        tokens = [
            [each[key] for each in choice["logprobs"]["content"]] for choice in (ours, theirs) for key in ("token", "logprob")
        ]
        assert tokens[0] == tokens[2]
        assert tokens[1] == pytest.approx(tokens[3], abs=1e-4)
