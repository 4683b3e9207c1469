"""`LLM` on a fake engine: lists in, answers out, errors, interruptions and ends."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import dashinfer
from dashinfer import LLM
from dashinfer.errors import ConfigurationError, EngineUnavailable, InsufficientMemory, InternalError, InvalidRequest
from dashinfer.serving.service import Service

from .fake_engine import FakeBackend, FakeEngine

pytestmark = pytest.mark.feature("Clients", "Python without a server")


class Backend(FakeBackend):
    """Keeps its engine."""

    engines: list[FakeEngine]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.engines = []

    def engine(self, *arguments: Any) -> FakeEngine:
        self.engines.append(super().engine(*arguments))
        return self.engines[-1]


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return Backend(tmp_path)


@pytest.fixture
def llm(backend: Backend) -> Iterator[LLM]:
    with LLM("fake", backend=backend) as llm:
        yield llm


def talk(*contents: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": content}] for content in contents]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "dashinfer"]


def test_conversations_are_answered_in_order(llm: LLM) -> None:
    answers = llm.chat(talk(*(f"say {number}" for number in range(600))))

    assert [answer.choices[0].message.content for answer in answers] == [str(number) for number in range(600)]
    assert answers[0].choices[0].finish_reason == "stop"
    assert answers[0].model == "fake"


def test_one_conversation_and_no_conversation(llm: LLM) -> None:
    (answer,) = llm.chat(talk("say hello")[0], {"n": 2})

    assert [choice.message.content for choice in answer.choices] == ["hello", "hello"]
    assert llm.chat([]) == []


def test_params_of_each(llm: LLM) -> None:
    answers = llm.chat(talk("say hello", "say hello"), [{"max_tokens": 2}, {"stop": ["o"]}])

    assert [answer.choices[0].message.content for answer in answers] == ["he", "hell"]


def test_prompts_are_texts_or_tokens(llm: LLM) -> None:
    tokens = list(b"say two")

    assert [each.choices[0].text for each in llm.generate("say one")] == ["one"]
    assert [each.choices[0].text for each in llm.generate(tokens)] == ["two"]
    assert [each.choices[0].text for each in llm.generate(["say one", "say two"], {"max_tokens": 1})] == ["o", "t"]
    assert [each.choices[0].text for each in llm.generate([tokens, "say one"])] == ["two", "one"]


def test_the_first_error_is_raised_and_drops_the_rest(llm: LLM, backend: Backend) -> None:
    with pytest.raises(InvalidRequest, match="temperature") as caught:
        llm.chat(talk("forever", "say x"), [{}, {"temperature": 9}])

    assert caught.value.__notes__ == ["request 1 of 2, counted from 0"]
    assert backend.engines[0].running == 0
    assert llm.chat(talk("say on"))[0].choices[0].message.content == "on"


def test_errors_in_the_place_of_answers(llm: LLM) -> None:
    answers = llm.chat(talk("say a", "say b", "say c"), [{}, {"nonsense": 1}, {}], return_errors=True)

    assert [type(answer).__name__ for answer in answers] == ["ChatCompletion", "InvalidRequest", "ChatCompletion"]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([{}], "there are 1 params for 2 requests"),
        ({"stream": True}, "'stream'"),
        ({"messages": []}, "'messages'"),
        ({"user": object()}, "cannot be written as JSON"),
        ({"user": "\ud800"}, "cannot be written as JSON"),
    ],
)
def test_params_that_cannot_be(llm: LLM, params: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.chat(talk("say a", "say b"), params)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_bach": 1}, r"'max_bach' is not a setting \(did you mean max_batch"),
        ({"max_batch": 0}, "max_batch: 0 is not at least 1"),
        ({"data_type": "bfloat17"}, "data_type: 'bfloat17' is not one of"),
        ({"nnodes": 2, "tensor_parallel": 2, "cluster_secret": "x"}, "several machines"),
    ],
)
def test_settings_that_cannot_be(backend: Backend, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LLM("fake", backend=backend, **settings)


def test_a_model_that_cannot_be_loaded_leaves_nothing(backend: Backend) -> None:
    with pytest.raises(InsufficientMemory, match=r"15.2 GiB"):
        LLM("no-memory", backend=backend)

    assert threads() == []


def test_an_engine_that_fails_is_told_to_those_who_wait_and_who_come_later(llm: LLM) -> None:
    with pytest.raises(InternalError, match="lost this request"):
        llm.chat(talk("crash"))
    for thread in threading.enumerate():
        if thread.name == "dashinfer":
            thread.join(10)
    with pytest.raises(EngineUnavailable, match="rank 0 died with signal 9"):
        llm.chat(talk("say x"))


def test_the_end(backend: Backend) -> None:
    llm = LLM("fake", backend=backend)
    llm.close()
    llm.close()

    assert threads() == []
    assert backend.engines[0].record == ["run ended"]
    with pytest.raises(EngineUnavailable, match="it was closed"):
        llm.chat(talk("say x"))


def test_one_that_is_forgotten_is_closed(backend: Backend) -> None:
    llm = LLM("fake", backend=backend)
    del llm

    assert threads() == []


def test_closing_ends_what_runs_in_other_threads(backend: Backend) -> None:
    llm = LLM("fake", backend=backend)
    waiting, errors = threading.Event(), []

    async def work(service: Service) -> None:
        waiting.set()
        await trio.sleep_forever()

    def wait() -> None:
        try:
            llm._thread.call(work)
        except EngineUnavailable as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(10)
    llm.close()
    thread.join(10)

    assert errors == ["the engine ended before the call was done"]


SCRIPT = """
import os, signal, sys
from pathlib import Path
from dashinfer import LLM
from tests.serving.fake_engine import FakeBackend, FakeEngine

class Engine(FakeEngine):
    def _notify(self):
        super()._notify()
        if self._waiting:
            os.kill(os.getpid(), signal.SIGINT)

class Backend(FakeBackend):
    def engine(self, *arguments):
        return Engine()

def ask(content):
    return llm.chat([{"role": "user", "content": content}])[0].choices[0].message.content

llm = LLM("fake", backend=Backend(Path(sys.argv[1])))
try:
    ask("wait ab")
except KeyboardInterrupt:
    print("interrupted,", ask("say going on"))
ask("wait ab")
"""


def test_ctrl_c_ends_a_call_and_another_one_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)

    assert result.stdout == "interrupted, going on\n", result.stderr
    assert result.returncode == -signal.SIGINT
    assert result.stderr.count("KeyboardInterrupt") == 1


def test_the_package_alone_is_light() -> None:
    script = "import sys, dashinfer; print(sorted({'trio', 'pydantic', 'dashinfer.serving'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="LLMs"):
        dashinfer.LLMs  # noqa: B018 - the access is what is tested
