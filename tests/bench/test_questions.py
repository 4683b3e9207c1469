"""What requests ask: lengths, shared prefixes, and files of conversations."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import trio

from dashinfer.bench.dataset import read_dataset
from dashinfer.bench.measure import Run, measure_round, prepare
from dashinfer.bench.prompts import CLOSING
from dashinfer.bench.questions import Question, random_questions, shuffled
from dashinfer.bench.settings import Settings
from dashinfer.errors import BenchError
from tests.bench.test_client import TARGET, echo_server, server


def take(settings: Settings, count: int, name: str = "round", words: int = 80) -> list[Question]:
    return list(itertools.islice(random_questions(settings, name, words), count))


def words_of(question: Question) -> list[str]:
    assert isinstance(question.content, str)
    return question.content.removesuffix(f". {CLOSING}").split()


def test_lengths_are_those_asked_for() -> None:
    questions = take(Settings(prompt_tokens=100, output_tokens=50), 20)

    assert {len(words_of(question)) for question in questions} == {80}
    assert {question.output_tokens for question in questions} == {50}
    assert len({tuple(words_of(question)[:4]) for question in questions}) == 20


def test_lengths_are_drawn_from_the_whole_range_and_no_more() -> None:
    questions = take(Settings(prompt_tokens=100, output_tokens=10, range_ratio=0.5), 500)

    prompts = {len(words_of(question)) for question in questions}
    assert (min(prompts), max(prompts)) == (30, 130)  # 20 tokens are the template's
    assert {question.output_tokens for question in questions} == set(range(5, 16))


def test_the_same_seed_asks_the_same_and_another_name_or_seed_does_not() -> None:
    settings = Settings(range_ratio=0.5)

    assert take(settings, 9) == take(settings, 9)
    assert not set(map(str, take(settings, 9))) & set(map(str, take(settings, 9, "another")))
    assert not set(map(str, take(settings, 9))) & set(map(str, take(Settings(range_ratio=0.5, seed=1), 9)))


def test_prefixes_are_shared_over_rounds_and_what_follows_is_not() -> None:
    settings = Settings(shared_prefix=30, prefixes=2)

    questions = take(settings, 6) + take(settings, 2, "another round")

    prefixes = [tuple(words_of(question)[:30]) for question in questions]
    assert prefixes == [prefixes[0], prefixes[1]] * 4
    assert prefixes[0] != prefixes[1]
    assert len({tuple(words_of(question)[30:34]) for question in questions}) == 8
    assert {len(words_of(question)) for question in questions} == {80}


def test_lengths_are_kept_where_words_are_not_tokens() -> None:
    settings = Settings(prompt_tokens=100, range_ratio=0.5, shared_prefix=20)

    questions = list(itertools.islice(random_questions(settings, "round", 20, 4.0), 500))

    lengths = [len(words_of(question)) for question in questions]
    assert (min(lengths), max(lengths)) == (20 - 12, 20 + 12)
    assert len({tuple(words_of(question)[:5]) for question in questions}) == 1
    assert len({tuple(words_of(question)[:6]) for question in questions}) > 100


def test_a_files_questions_all_come_before_any_comes_again() -> None:
    questions = [Question(content=str(index), output_tokens=1) for index in range(20)]

    order = list(itertools.islice(shuffled(questions, 0), 40))

    assert sorted(order[:20], key=questions.index) == questions
    assert order[:20] != questions
    assert order[20:] == order[:20]
    assert list(itertools.islice(shuffled(questions, 1), 20)) != order[:20]


SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Hello to you. " * 4},
        {"from": "human", "value": "Bye."},
        {"from": "gpt", "value": "Bye."},
    ],
}
MESSAGES = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Two it is"},
]


def read(tmp_path: Path, text: str, output_tokens: int | None = None, **settings: Any) -> list[Question]:
    (tmp_path / "data").write_text(text)
    return read_dataset(tmp_path / "data", Settings(**settings), output_tokens)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Hi"}, Question(content="Hi", output_tokens=64)),
        ({"prompt": "Hi", "output_tokens": 7}, Question(content="Hi", output_tokens=7)),
        ({"messages": MESSAGES}, Question(content="Two?", output_tokens=2, before=tuple(MESSAGES[:2]))),
        ({"messages": MESSAGES[:1], "max_tokens": 5}, Question(content="One?", output_tokens=5)),
        ({"custom_id": "a", "body": {"model": "m", "messages": MESSAGES[:1]}}, Question(content="One?", output_tokens=64)),
        (SHAREGPT, Question(content="Hello?", output_tokens=14, before=({"role": "system", "content": "Be brief."},))),
    ],
)
@pytest.mark.parametrize("lines", [True, False])
def test_every_shape_is_read(record: dict[str, Any], expected: Question, lines: bool, tmp_path: Path) -> None:
    text = f"{json.dumps(record)}\n\n{json.dumps(record)}\n" if lines else json.dumps([record, record], indent=1)

    assert read(tmp_path, text) == [expected, expected]


def test_lengths_on_the_command_line_are_those_of_all_answers(tmp_path: Path) -> None:
    text = json.dumps([SHAREGPT, {"prompt": "a", "output_tokens": 9}])

    assert [question.output_tokens for question in read(tmp_path, text, output_tokens=3)] == [3, 3]


def test_conversations_without_question_or_answer_are_left_out(tmp_path: Path) -> None:
    junk = [{"conversations": turns} for turns in ([], SHAREGPT["conversations"][:2], SHAREGPT["conversations"][2:3])]

    assert len(read(tmp_path, json.dumps([*junk, SHAREGPT]))) == 1
    with pytest.raises(BenchError, match="data has no question"):
        read(tmp_path, json.dumps(junk))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt"', "data, line 2: not JSON"),
        ('[{"prompt": "a"}', "data, the whole: not JSON"),
        ('[{"prompt": "a"}, {"text": "a"}]', 'record 2: none of "prompt"'),
        ('{"prompt": ""}', "line 1: a message without content"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "line 1: no message of the user"),
        ('{"messages": ["a"]}', "line 1: a message that is not an object"),
        ('{"conversations": [{"from": "human"}]}', "line 1: a turn without a value"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens is not a number of tokens"),
        ("3", "line 1: not an object"),
        ("", "has no question"),
    ],
)
def test_a_file_that_is_no_dataset_is_refused_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=message):
        read(tmp_path, text)


def test_no_file_and_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")

    with pytest.raises(BenchError, match=r"cannot read --dataset .*none: No such file"):
        read_dataset(tmp_path / "none", Settings(), None)
    with pytest.raises(BenchError, match=r"cannot read --dataset .*bytes"):
        read_dataset(tmp_path / "bytes", Settings(), None)


def test_completions_take_prompts_alone(tmp_path: Path) -> None:
    assert len(read(tmp_path, '{"prompt": "a"}', endpoint="completions")) == 1
    with pytest.raises(BenchError, match="use --endpoint chat"):
        read(tmp_path, json.dumps({"messages": MESSAGES}), endpoint="completions")


async def test_a_file_is_asked_on_through_rounds(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[dict[str, Any]] = []
    questions = [
        Question(content=f"Question {index}?", output_tokens=index + 3, before=({"role": "system", "content": "Be brief."},))
        for index in range(6)
    ]
    run = Run(TARGET, dataset=questions, connect=server(lambda body: echo_server(body), seen))
    settings = Settings(concurrency=(1,), requests=2, warmup=2, dataset="data.jsonl")

    await prepare(run, settings)
    for number in range(2):
        figures = await measure_round(run, 1, number, settings)

    asked = [body for body in seen if len(body["messages"]) == 2]
    assert {body["messages"][1]["content"] for body in asked} == {question.content for question in questions}
    assert all(body["max_tokens"] == int(body["messages"][1]["content"][9]) + 3 for body in asked)
    assert run.words == 0
    assert figures.output_tokens == figures.wanted_tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "a", "shared_prefix": 3}, "goes with none of --images"),
        ({"images": ((1, 1),), "range_ratio": 0.5}, "goes with none of --range-ratio"),
        ({"images": ((1, 1),), "endpoint": "completions"}, "needs --endpoint chat"),
        ({"images": ((1, 1),), "duration": 1.0}, "--images needs --requests"),
        ({"max_concurrency": 3}, "bounds --request-rate"),
        ({"request_rate": (1.0, float("inf")), "duration": 1.0}, "needs a finite --request-rate"),
        ({"range_ratio": 1.0}, "not from 0 to below 1"),
        ({"prompt_tokens": 40, "range_ratio": 0.5, "shared_prefix": 20}, "--shared-prefix is not shorter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        Settings(**given)
