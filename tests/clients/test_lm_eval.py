"""EleutherAI's evaluation harness, on the tasks in `tasks/`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from dashinfer.sources.resolve import resolve
from tests.e2e.conftest import ServerProcess

from .conftest import HERE, KEY, Report, needs, run

pytestmark = pytest.mark.feature("Clients", "LM Evaluation Harness")

TASKS = HERE / "tasks"
DOCUMENTS = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]
ACCURACY = 1e-3  # of log-likelihoods in float32, whatever is computed together


@pytest.fixture(scope="module")
def completions(program: Callable[..., Report]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and responses by task."""
    needs("lm_eval")
    results, responses = program("lm_eval_client.py")["completions"]
    return results, responses


@pytest.fixture(scope="module")
def scores(completions: tuple[dict[str, Any], dict[str, Any]]) -> list[list[float]]:
    """Log-likelihoods of each question's choices."""
    return [[float(answer[0][0]) for answer in choices] for choices in completions[1]["dashinfer_capitals"]]


def test_log_likelihoods(scores: list[list[float]], server: ServerProcess) -> None:
    """They are the sums over a choice's tokens of what `echo` and `logprobs` tell of the whole text."""
    expected = []
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        for document in DOCUMENTS:
            for choice in document["choices"]:
                question = document["question"]
                asked = {"model": "demo", "prompt": f"{question} {choice}", "echo": True, "logprobs": 0, "max_tokens": 0}
                found = client.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
                pairs = zip(found["text_offset"], found["token_logprobs"], strict=True)
                expected.append(sum(logprob for offset, logprob in pairs if offset >= len(question)))

    assert [score for choices in scores for score in choices] == pytest.approx(expected, abs=ACCURACY)


def test_accuracy(completions: tuple[dict[str, Any], dict[str, Any]], scores: list[list[float]]) -> None:
    chosen = [choices.index(max(choices)) for choices in scores]

    assert chosen == [document["answer"] for document in DOCUMENTS]
    assert completions[0]["dashinfer_capitals"]["acc,none"] == 1.0


def test_generation(completions: tuple[dict[str, Any], dict[str, Any]]) -> None:
    answers = [answer[0][0] for answer in completions[1]["dashinfer_answers"]]

    assert "Paris" in answers[0]
    assert not any("\n" in answer or "." in answer for answer in answers)


@pytest.mark.clients
def test_the_command_on_chats(server: ServerProcess, tmp_path: Path) -> None:
    needs("lm_eval")
    (tmp_path / "capitals.jsonl").write_bytes((TASKS / "capitals.jsonl").read_bytes())
    run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--apply_chat_template"),
            *("--model_args", f"model=demo,base_url={server.url}/v1/chat/completions,max_retries=1"),
            *("--tasks", "dashinfer_answers", "--include_path", str(TASKS), "--output_path", "results", "--log_samples"),
        ],
        tmp_path,
        OPENAI_API_KEY=KEY,
    )
    (file,) = tmp_path.glob("results/**/samples_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda each: each["doc_id"])

    assert len(samples) == len(DOCUMENTS)
    assert "Tokyo" in samples[2]["resps"][0][0]


@pytest.mark.clients
def test_log_likelihoods_of_transformers(scores: list[list[float]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(resolve("demo").files.weights[0])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    expected = []
    for document in DOCUMENTS:
        before = len(tokenizer.encode(document["question"]))
        for choice in document["choices"]:
            tokens = torch.tensor([tokenizer.encode(f"{document['question']} {choice}")])
            with torch.inference_mode():
                logprobs = model(tokens).logits[0, :-1].log_softmax(-1)
            expected.append(float(logprobs.gather(1, tokens[0, 1:, None])[before - 1 :].sum()))

    assert [score for choices in scores for score in choices] == pytest.approx(expected, abs=ACCURACY)
