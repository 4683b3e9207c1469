"""Constraints behind free thinking, followed by llguidance."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dashinfer.guidance.spec import Constraint
from dashinfer.text.reasoning import REASONING_FORMATS
from dashinfer.text.thinking import thinking_rules, whole_output
from dashinfer.text.tokenizer import byte_alphabet
from dashinfer.text.tools.grammar import Function, call_grammar

pytestmark = pytest.mark.feature("Reasoning", "Thinking switched and bounded")

llguidance = pytest.importorskip("llguidance")

QWEN = REASONING_FORMATS["qwen3"]
ANSWER = Constraint.from_choice(["yes", "no"], "response_format")
END, OPEN, CLOSE, TOOL_CALL = 256, 257, 258, 259


@pytest.fixture(scope="module")
def vocabulary():
    """The bytes, and the markers as tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE({character: byte for byte, character in byte_alphabet().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
    return llguidance.LLTokenizer(tokenizer.to_str(), eos_token=END)


def token_id(text: str) -> int | None:
    return {"<think>": OPEN, "</think>": CLOSE, "<tool_call>": TOOL_CALL}.get(text)


def follows(vocabulary, constraint: Constraint, tokens: list[int]) -> bool:
    """Whether this is a whole output."""
    matcher = llguidance.LLMatcher(vocabulary, constraint.grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def after_thinking(answer: Constraint | None, **options) -> Constraint:
    options = {"token_id": token_id, "inside": True, **options}
    return whole_output(thinking=thinking_rules(QWEN, **options), answer=answer, param="max_thinking_tokens")


def tokens(*parts: str | int) -> list[int]:
    return [token for part in parts for token in ([part] if isinstance(part, int) else part.encode())]


@pytest.mark.parametrize(
    ("inside", "output", "expected"),
    [
        (True, tokens("I say\nno", CLOSE, "\n\nyes"), True),
        (True, tokens(CLOSE, "yes"), True),
        (True, tokens("yes"), False),
        (True, tokens("I say</think>yes"), False),
        (True, tokens("I say", CLOSE, "maybe"), False),
        (True, tokens("I say", CLOSE), False),
        (False, tokens(OPEN, "I say", CLOSE, "\nno"), True),
        (False, tokens("no"), True),
        (False, tokens("I say", CLOSE, "no"), False),
    ],
)
def test_an_answer_after_thinking(vocabulary, inside: bool, output: list[int], expected: bool) -> None:
    constraint = after_thinking(ANSWER, inside=inside)

    assert follows(vocabulary, constraint, output) == expected
    assert constraint.param == "response_format"


@pytest.mark.parametrize("answer", [ANSWER, None])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_end_of_the_thinking_is_forced(vocabulary, answer: Constraint | None, most: int) -> None:
    constraint = after_thinking(answer, max_tokens=most)

    assert follows(vocabulary, constraint, tokens("x" * most, CLOSE, "yes"))
    assert not follows(vocabulary, constraint, tokens("x" * (most + 1), CLOSE, "yes"))
    assert follows(vocabulary, constraint, tokens(CLOSE, "yes"))


def test_a_free_answer_is_any_tokens(vocabulary) -> None:
    constraint = after_thinking(None, max_tokens=3)

    assert follows(vocabulary, constraint, tokens("ab", CLOSE, "Calls: ", TOOL_CALL, "é"))
    assert follows(vocabulary, constraint, tokens("ab", CLOSE))


def test_markers_that_are_no_tokens(vocabulary) -> None:
    constraint = after_thinking(ANSWER, inside=False, token_id=lambda _: None)

    assert follows(vocabulary, constraint, tokens("<think>I say</think>\n\nyes"))
    assert follows(vocabulary, constraint, tokens("yes"))
    with pytest.raises(ValueError, match="no token that ends its thinking"):
        after_thinking(ANSWER, inside=False, token_id=lambda _: None, max_tokens=3)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (tokens("So", CLOSE, "\n\n", TOOL_CALL, '\n{"name": "now", "arguments": {}}\n</tool_call>'), True),
        (tokens("So", CLOSE, "yes"), True),
        (tokens("So", CLOSE, "maybe"), False),
        (tokens("So", CLOSE, TOOL_CALL, '\n{"name": "then", "arguments": {}}\n</tool_call>'), False),
        (tokens(TOOL_CALL, '\n{"name": "now", "arguments": {}}\n</tool_call>'), False),
    ],
)
def test_calls_or_an_answer_after_thinking(vocabulary, output: list[int], expected: bool) -> None:
    calls = call_grammar("hermes", "", [Function("now", {})], required=True, parallel=True, token_id=token_id, rule="calls")
    thinking = thinking_rules(QWEN, inside=True, token_id=token_id)

    assert follows(vocabulary, whole_output(thinking=thinking, calls=calls, answer=ANSWER, param="tools"), output) == expected


def test_nothing_is_put_around_an_answer_alone() -> None:
    assert whole_output(answer=ANSWER, param="tools") is ANSWER
