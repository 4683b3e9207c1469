"""Thinking and answer, taken apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashinfer.text.output import OutputParser
from dashinfer.text.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningSplitter, reasoning_format
from dashinfer.text.tools.events import Content, Reasoning
from dashinfer.text.tools.hermes import HermesParser

pytestmark = pytest.mark.feature("Reasoning", "Thinking apart from the answer")

QWEN = REASONING_FORMATS["qwen3"]


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(QWEN, inside=inside)
    found = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(thought for thought, _ in found), "".join(answer for _, answer in found)


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("<think>\nHm. So.\n</think>\n\nYes.", False, ("Hm. So.", "Yes.")),
        ("\nHm. <think> So.\n</think>\n\n Yes.\n", True, ("Hm. <think> So.", " Yes.\n")),
        ("<think>\nHm.</think>Yes.", True, ("Hm.", "Yes.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>Hm.", False, ("Hm.", "")),
        ("Hm.\n", True, ("Hm.", "")),
        ("Hm.\n</thi", True, ("Hm.\n</thi", "")),
        ("Hm.</think>", True, ("Hm.", "")),
        (" Yes. <think>Hm.</think>", False, ("", " Yes. <think>Hm.</think>")),
        ("<thin", False, ("", "<thin")),
        ("", False, ("", "")),
        ("", True, ("", "")),
    ],
)
def test_thinking_and_answer(text: str, inside: bool, expected: tuple[str, str]) -> None:
    assert split([text], inside=inside) == expected
    assert split(list(text), inside=inside) == expected


WORDS = ["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "b "]


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.sampled_from(WORDS), max_size=12), inside=st.booleans())
def test_any_pieces_give_the_same(pieces: list[str], inside: bool) -> None:
    assert (
        split(list("".join(pieces)), inside=inside) == split(pieces, inside=inside) == split(["".join(pieces)], inside=inside)
    )


@pytest.mark.parametrize(
    ("name", "prompt", "inside"),
    [
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "<|Assistant|>", True),
        ("deepseek_r1", "<|Assistant|><think>\n\n</think>\n\n", False),
    ],
)
def test_the_prompt_tells_whether_thinking_has_begun(name: str, prompt: str, inside: bool) -> None:
    assert REASONING_FORMATS[name].begins_inside(prompt) == inside


@pytest.mark.parametrize(
    ("name", "template", "tokens", "expected"),
    [
        ("auto", "{{ content.split('</think>')[-1] }}", (), QWEN),
        ("auto", None, ("<think>", "</think>"), QWEN),
        ("auto", "[THINK]{{ x }}[/THINK]", (), REASONING_FORMATS["mistral"]),
        ("auto", "{{ x }}", ("<think>",), None),
        ("none", "</think>", (), None),
        ("deepseek_r1", None, (), REASONING_FORMATS["deepseek_r1"]),
    ],
)
def test_formats_are_found(name, template, tokens: tuple[str, ...], expected: ReasoningFormat | None) -> None:
    assert reasoning_format(name, template, lambda text: 1 if text in tokens else None) is expected


def test_calls_come_after_the_thinking() -> None:
    parser = OutputParser(ReasoningSplitter(QWEN, inside=False), HermesParser({}))
    text = '<think>Call <tool_call>{"name": "f"}?</think>\n\nYes <tool_call>{"name": "f"}</tool_call>'
    first, *rest = [*parser.push(text), *parser.finish()]

    assert first == Reasoning('Call <tool_call>{"name": "f"}?')
    assert rest[0] == Content("Yes")
    assert parser.calls == 1
    assert not parser.thinking
