"""OpenAI's package for Node, as `node/openai_client.mjs` uses it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import ServerProcess

from .conftest import HERE, KEY, Report, run

pytestmark = pytest.mark.feature("Clients", "OpenAI's for Node")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and what npm installs for it."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no Node on this machine")
    folder = tmp_path_factory.mktemp("node")
    for file in (HERE / "node").iterdir():
        shutil.copy(file, folder)
    quiet = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--prefer-offline"]
    done = subprocess.run([npm, "install", *quiet], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f"npm cannot install the client: {done.stderr.strip().splitlines()[:1]}")
    return folder


@pytest.fixture(scope="module")
def node(package: Path, server: ServerProcess) -> Report:
    return Report(run(["node", "openai_client.mjs", server.url, KEY], package))


@pytest.fixture(scope="module")
def more(package: Path, server: ServerProcess) -> Report:
    return Report(run(["node", "openai_client.mjs", server.url, KEY, "more"], package))


def test_models(node: Report) -> None:
    assert node["models"] == [["demo"], "demo"]


def test_chat(node: Report) -> None:
    whole, streamed = node["whole"], node["streamed"]

    assert "Paris" in whole["text"]
    assert (whole["finish"], whole["adds_up"], whole["same_id"]) == ("stop", True, True)
    assert streamed == {"text": whole["text"], "same": True, "tokens": True}


@pytest.mark.clients
def test_more_chat(more: Report) -> None:
    text, kinds = more["helper_streamed"]

    assert "Paris" in text
    assert kinds == ["content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"]
    assert more["choices"] == [0, 1, 2]


def test_a_named_tool(node: Report) -> None:
    whole = node["named_tool"]

    assert whole["args"]["city"] in ("Paris", "Rome")
    assert 1 <= whole["args"]["days"] <= 9
    assert (whole["finish"], whole["after"]) == ("tool_calls", None)


@pytest.mark.clients
def test_more_tools(more: Report) -> None:
    assert more["named_tool_streamed"]["args"].keys() == {"city", "days"}
    assert more["named_tool_streamed"]["several"]
    assert more["run_tools"] == [1, True, ["user", "assistant", "tool"]]


@pytest.mark.clients
def test_structured_responses(more: Report) -> None:
    assert more["responses_structured"] is True


def test_structured_output(node: Report) -> None:
    assert node["structured"] == [True, "number"]


def test_abort(node: Report) -> None:
    assert node["aborted"] == {"chunks": 3, "aborted": True, "helper": True}


def test_errors(node: Report) -> None:
    errors = node["errors"]

    assert {name: (error["class"], error["status"]) for name, error in errors.items()} == {
        "key": ("AuthenticationError", 401),
        "value": ("BadRequestError", 400),
        "streamed": ("BadRequestError", 400),
        "model": ("NotFoundError", 404),
        "long": ("BadRequestError", 400),
        "route": ("NotFoundError", 404),
        "file": ("NotFoundError", 404),
    }
    assert errors["value"]["param"] == errors["streamed"]["param"] == "temperature"
    assert [errors[name]["code"] for name in ("key", "model", "long")] == [
        *("invalid_api_key", "model_not_found", "context_length_exceeded")
    ]
    assert {error["id"] for error in errors.values()} == {"string"}


@pytest.mark.clients
def test_completion(more: Report) -> None:
    text, tokens = more["completion"]

    assert "Paris" in text
    assert tokens == 5


def test_embeddings(node: Report) -> None:
    assert node["embeddings"] == [2, 576, True]


def test_responses(node: Report) -> None:
    found = node["responses"]

    assert "Paris" in found["text"]
    assert found["same"]
    assert found["types"] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
        *("response.output_item.done", "response.completed"),
    ]
    assert found["items"] == ["user", "assistant", "user"]
    assert (found["gone"], found["cancel"]) == ("NotFoundError", "BadRequestError")
