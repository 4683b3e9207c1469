"""LangChain, as `programs/langchain_client.py` uses it."""

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import Report, needs

pytestmark = pytest.mark.feature("Clients", "LangChain")

CLIENTS = ("langchain_openai", "langchain_anthropic")


@pytest.fixture(scope="module")
def langchain(program: Callable[..., Report]) -> Report:
    needs(*CLIENTS)
    return program("langchain_client.py")


@pytest.fixture(scope="module")
def more(program: Callable[..., Report]) -> Report:
    needs(*CLIENTS)
    return program("langchain_client.py", "more")


def is_person(found: dict[str, Any]) -> bool:
    return found.keys() == {"name", "age", "mood"} and 1 <= found["age"] <= 99 and found["mood"] in ("happy", "sad")


def test_invoke(langchain: Report) -> None:
    text, usage, finish = langchain["invoke"]

    assert "Paris" in text
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert finish == "stop"


def test_stream(langchain: Report) -> None:
    pieces, text, usage, whole = langchain["stream"]

    assert pieces > 3
    assert text == whole
    assert usage["output_tokens"] > 3


def test_asynchronous(langchain: Report) -> None:
    whole, streamed = langchain["asynchronous"]

    assert "Paris" in whole
    assert streamed == whole


def test_structured_output(langchain: Report) -> None:
    assert is_person(langchain["structured"])


def test_tools(langchain: Report) -> None:
    arguments, result, finish, after, calls = langchain["tools"]

    assert arguments["city"] in result
    assert finish == "tool_calls"
    assert after and calls == []


def test_responses(langchain: Report) -> None:
    whole, streamed, first, second = langchain["responses_api"]

    assert "Paris" in whole
    assert streamed == whole
    assert second["input_tokens"] > first["total_tokens"]


@pytest.mark.clients
def test_completion(more: Report) -> None:
    assert "Paris" in more["completion"]


def test_embeddings(langchain: Report) -> None:
    size, difference = langchain["embeddings"]

    assert size == 576
    assert difference < 0.01  # alone or in company, a vector is rounded a little differently


def test_errors(langchain: Report) -> None:
    errors = langchain["errors"]

    assert {name: status for name, (_, status) in errors.items()} == {"model": 404, "key": 401, "value": 400, "long": 400}
    assert "NotFoundError" in errors["model"][0]
    assert "AuthenticationError" in errors["key"][0]
    assert "BadRequestError" in errors["value"][0]
    assert "ContextOverflowError" in errors["long"][0]


def test_anthropic(langchain: Report) -> None:
    whole, streamed, usage = langchain["anthropic"]

    assert "Paris" in whole
    assert streamed == whole
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


@pytest.mark.clients
def test_chains_and_batches(more: Report) -> None:
    (first, second, third), alone = more["batch"]

    assert more["chain"] == "The capital of France is Paris."
    assert "Paris" in first
    assert second == alone
    assert third


@pytest.mark.clients
def test_more_structured_output(more: Report) -> None:
    assert more["json_mode"] == "{"
    assert is_person(more["structured_by_function"])
    assert is_person(more["responses_api_structured"])
    assert is_person(more["anthropic_structured"])


@pytest.mark.clients
def test_more_tools(more: Report) -> None:
    assert [name for name, _ in more["tools_streamed"]][:1] == ["weather"]
    assert {tuple(sorted(arguments)) for _, arguments in more["tools_streamed"]} == {("city", "days")}
    assert more["responses_api_tools"].keys() == more["anthropic_tools"].keys() == {"city", "days"}


@pytest.mark.clients
def test_logprobs(more: Report) -> None:
    text, joined, both = more["logprobs"]

    assert text == joined
    assert both
