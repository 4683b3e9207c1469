"""LiteLLM, as `programs/litellm_client.py` uses it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from .conftest import Report, needs

pytestmark = pytest.mark.feature("Clients", "LiteLLM")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with LiteLLM, which nothing else sees: it keeps huggingface_hub below 2, for uses that are not these."""
    needs("dotenv", "fastuuid", "importlib_metadata", "pydantic_settings", "tiktoken")
    folder = tmp_path_factory.mktemp("litellm")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    done = subprocess.run([*install, "litellm>=1.100"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install LiteLLM: {done.stderr.strip().splitlines()[-1]}")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def litellm(program: Callable[..., Report], package: str) -> Report:
    return program("litellm_client.py", PYTHONPATH=package)


@pytest.fixture(scope="module")
def more(program: Callable[..., Report], package: str) -> Report:
    return program("litellm_client.py", "more", PYTHONPATH=package)


@pytest.mark.parametrize(
    ("report", "prefix"), [("litellm", "openai"), pytest.param("more", "hosted_vllm", marks=pytest.mark.clients)]
)
def test_chat(request: pytest.FixtureRequest, report: str, prefix: str) -> None:
    found = request.getfixturevalue(report)[prefix]

    assert "Paris" in found["whole"]
    assert found["streamed"] == found["rebuilt"] == found["whole"]
    assert found["finish"] == ["stop", "stop"]
    assert found["usage"][0] == found["usage"][1]


def test_asynchronous(litellm: Report) -> None:
    whole, streamed = litellm["asynchronous"]

    assert "Paris" in whole
    assert streamed == whole


@pytest.mark.clients
def test_batch(more: Report) -> None:
    first, second = more["batch"]

    assert "Paris" in first
    assert second


def test_tools(litellm: Report) -> None:
    calls, finish, after = litellm["tools"]

    assert [name for name, _ in calls] == ["weather", "weather"]
    assert [json.loads(arguments).keys() for _, arguments in calls] == [{"city", "days"}] * 2
    assert finish == "tool_calls"
    assert after in ("stop", "length", "tool_calls")


@pytest.mark.clients
def test_structured_output(more: Report) -> None:
    first, second = more["structured"]

    assert first.keys() == second.keys() == {"name", "age", "mood"}


@pytest.mark.clients
def test_completion(more: Report) -> None:
    text, tokens = more["text_completion"]

    assert "Paris" in text
    assert tokens == 5


@pytest.mark.clients
def test_embeddings(more: Report) -> None:
    assert more["embedding"] == [[576, 576], [576, 576]]


def test_responses(litellm: Report) -> None:
    text, first, last = litellm["responses"]

    assert "Paris" in text
    assert (first, last) == ("response.created", "response.completed")


@pytest.mark.clients
def test_anthropic(more: Report) -> None:
    whole, streamed = more["anthropic"]

    assert "Paris" in whole
    assert streamed == whole


def test_errors(litellm: Report) -> None:
    errors = {name: (kinds[0], status) for name, (kinds, status) in litellm["errors"].items()}

    assert errors == {
        "model": ("NotFoundError", 404),
        "key": ("AuthenticationError", 401),
        "value": ("BadRequestError", 400),
        "long": ("ContextWindowExceededError", 400),
        "vllm model": ("NotFoundError", 404),
        "vllm long": ("ContextWindowExceededError", 400),
    }
