"""EleutherAI's evaluation harness, on the tasks in `tasks/`."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ServerProcess

from .conftest import HERE, KEY, needs, run

TASKS = HERE / "tasks"
DOCUMENTS = [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text().splitlines()]


def evaluate(server: ServerProcess, folder: Path, model: str, path: str, *tasks: str, **arguments: str) -> dict[str, Any]:
    """Results by task, and under `samples` what was asked and answered."""
    needs("lm_eval")
    given = {"model": "demo", "base_url": server.url + path, "auth_token": KEY, "max_retries": "1", **arguments}
    (folder / "capitals.jsonl").write_bytes((TASKS / "capitals.jsonl").read_bytes())
    template = ["--apply_chat_template"] if "chat" in model else []
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", ",".join(tasks)),
        *("--model_args", ",".join(f"{name}={value}" for name, value in given.items())),
        *("--include_path", str(TASKS), "--output_path", str(folder / "results"), "--log_samples", *template),
    ]
    run(command, folder, OPENAI_API_KEY=KEY)
    (results,) = folder.glob("results/**/results_*.json")
    found = json.loads(results.read_text())["results"]
    samples = {}
    for task in tasks:
        (file,) = folder.glob(f"results/**/samples_{task}_*.jsonl")
        samples[task] = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda each: each["doc_id"])
    return {**found, "samples": samples}


def scores(sample: dict[str, Any]) -> list[float]:
    """Log-likelihoods of a question's choices."""
    return [float(answer[0][0]) for answer in sample["resps"]]


@pytest.fixture(scope="module")
def completions(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("completions")
    arguments = {"tokenizer_backend": "remote", "num_concurrent": "4", "max_length": "1024"}
    tasks = ("dashinfer_capitals", "dashinfer_answers")
    return evaluate(server, folder, "local-completions", "/v1/completions", *tasks, **arguments)


def test_log_likelihoods(completions: dict[str, Any], server: ServerProcess) -> None:
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
    actual = [score for sample in completions["samples"]["dashinfer_capitals"] for score in scores(sample)]

    # Which of a text's blocks are cached, and what is computed together with it, changes how sums are rounded.
    assert actual == pytest.approx(expected, abs=0.1)


def test_accuracy(completions: dict[str, Any]) -> None:
    samples = completions["samples"]["dashinfer_capitals"]
    right = [
        scores(sample).index(max(scores(sample))) == document["answer"]
        for sample, document in zip(samples, DOCUMENTS, strict=True)
    ]

    assert completions["dashinfer_capitals"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert sum(right) >= 5


def test_generation(completions: dict[str, Any]) -> None:
    answers = [sample["resps"][0][0] for sample in completions["samples"]["dashinfer_answers"]]

    assert "Paris" in answers[0]
    assert not any("\n" in answer or "." in answer for answer in answers)


@pytest.mark.clients
def test_chat(server: ServerProcess, tmp_path: Path) -> None:
    found = evaluate(server, tmp_path, "local-chat-completions", "/v1/chat/completions", "dashinfer_answers")
    answers = [sample["resps"][0][0] for sample in found["samples"]["dashinfer_answers"]]

    assert "Paris" in answers[0] and "Rome" in answers[1]


@pytest.mark.clients
def test_log_likelihoods_of_transformers(completions: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from dashinfer.sources.resolve import resolve

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
    actual = [score for sample in completions["samples"]["dashinfer_capitals"] for score in scores(sample)]

    assert actual == pytest.approx(expected, abs=0.5, rel=0.02)
