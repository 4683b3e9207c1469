"""Structured output of a real server on the demo model, through OpenAI's client."""

import json
import re
import threading
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

NAME = "Qwen2.5-7B-Instruct"
MESSAGES = [{"role": "user", "content": "Invent a person who lives in Paris."}]


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 20},
                "age": {"type": "integer", "minimum": 1, "maximum": 99},
                "mood": {"enum": ["happy", "sad"]},
            },
            "required": ["name", "age", "mood"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
def test_the_clients_parse_gives_a_model(client):
    completion = client.chat.completions.parse(
        model=NAME, messages=MESSAGES, response_format=Person, temperature=0, max_tokens=200
    )

    assert completion.choices[0].finish_reason == "stop"
    assert isinstance(completion.choices[0].message.parsed, Person)


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
def test_every_choice_of_a_stream_is_of_the_schema(client):
    texts, finishes, tokens = ["", ""], ["", ""], [b"", b""]
    logprobs: list[float] = []
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format=FORMAT, n=2, temperature=1.5, seed=1, max_tokens=200, stream=True,
        logprobs=True,
    )  # fmt: skip
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            for entry in choice.logprobs.content if choice.logprobs else ():
                tokens[choice.index] += bytes(entry.bytes)
                logprobs.append(entry.logprob)

    assert finishes == ["stop", "stop"]
    for text in texts:
        assert 1 <= Person.model_validate_json(text).age <= 99
    assert [each.decode() for each in tokens] == texts
    assert max(logprobs) <= 0
    assert min(logprobs) < -1  # forced ones too have what the model gave them


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.feature("Structured output", "Regular expressions, choices, grammars")
def test_constrained_requests_share_steps_with_others(client):
    formats = {
        "regex": {"type": "regex", "regex": "[A-Z][a-z]{2,8}, [0-9]{2}"},
        "choice": {"type": "choice", "choice": ["Berlin", "Paris"]},
        "grammar": {"type": "grammar", "grammar": 'start: "<" /[a-z]{1,9}/ ">"'},
        "json_object": {"type": "json_object"},
        "text": {"type": "text"},
    }
    texts = {}

    def ask(name: str) -> None:
        answer = client.chat.completions.create(
            model=NAME, messages=MESSAGES, temperature=0, max_tokens=60, extra_body={"response_format": formats[name]}
        )
        texts[name] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(name,)) for name in formats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert re.fullmatch("[A-Z][a-z]{2,8}, [0-9]{2}", texts["regex"])
    assert texts["choice"] in ("Berlin", "Paris")
    assert re.fullmatch("<[a-z]{1,9}>", texts["grammar"])
    assert texts["json_object"].startswith("{")
    assert texts["text"] and not texts["text"].startswith("{")


def test_max_tokens_cuts_and_stop_strings_end(client):
    shared = {"model": NAME, "messages": MESSAGES, "response_format": FORMAT, "temperature": 0}
    cut = client.chat.completions.create(**shared, max_tokens=4).choices[0]
    stopped = client.chat.completions.create(**shared, max_tokens=100, stop=['"age"']).choices[0]

    assert cut.finish_reason == "length"
    assert stopped.finish_reason == "stop"
    assert stopped.message.content.startswith("{") and "age" not in stopped.message.content


def test_a_bad_schema_is_a_400_that_names_the_field(client):
    bad = json.loads(json.dumps(FORMAT).replace('"integer"', '"int"'))
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=NAME, messages=MESSAGES, response_format=bad, stream=True)

    assert error.value.param == "response_format.json_schema.schema"
    assert "Invalid type: int" in error.value.message
