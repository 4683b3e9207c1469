"""Constraints to guides: what they admit, what they refuse, and that nothing a client sends ends the process."""

import json
import random
import sys
import threading
from typing import ClassVar

import pytest
import trio
import trio.testing

from dashinfer.errors import InvalidRequest
from dashinfer.guidance import checker as checker_module
from dashinfer.guidance import compiler as compiler_module
from dashinfer.guidance.check import check
from dashinfer.guidance.compiler import Compiler
from dashinfer.guidance.guide import Grammar
from dashinfer.guidance.spec import Constraint
from dashinfer.text.tokenizer import Tokenizer


@pytest.fixture
def compiler(tokenizer: Tokenizer):
    made = Compiler(tokenizer, tokenizer.vocab_size + 40, max_waiting=10)
    yield made
    made.close()


def allowed(mask: bytes) -> list[int]:
    return [token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1]


def draw(grammar: Grammar, tokenizer: Tokenizer, seed: int, most: int = 200) -> str:
    """The text of tokens that are drawn from those allowed, with the end as soon as there may be one."""
    guide, tokens, choice = grammar.guide(), [], random.Random(seed)
    while len(tokens) < most:
        ids = allowed(guide.mask())
        assert ids and guide.error is None
        if set(ids) & set(tokenizer.eos_token_ids):
            return b"".join(map(tokenizer.token_bytes, tokens)).decode()
        tokens.append(choice.choice(ids))
        assert tokenizer.token_bytes(tokens[-1])
        guide.advance(tokens[-1])
        assert guide.error is None
    raise AssertionError("no end")


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text may be said, by the longest tokens, and end there."""
    guide, left = grammar.guide(), text.encode()
    while left:
        words = {tokenizer.token_bytes(token): token for token in allowed(guide.mask())}
        word = max((word for word in words if word and left.startswith(word)), key=len, default=b"")
        if not word:
            return False
        guide.advance(words[word])
        left = left[len(word) :]
    return bool(set(allowed(guide.mask())) & set(tokenizer.eos_token_ids))


async def test_what_is_drawn_is_of_the_schema(compiler, tokenizer):
    properties = {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
    grammar = await compiler.compile(Constraint.from_schema(schema, "p"))

    for seed in range(20):
        value = json.loads(draw(grammar, tokenizer, seed))
        assert type(value["a"]) is int and value["b"] in ("x", "y") and len(value) == 2


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.feature("Structured output", "Regular expressions, choices, grammars")
@pytest.mark.parametrize(
    ("constraint", "yes", "no"),
    [
        (Constraint.from_choice(["yes", 'no "never"\n', "🙂"], "p"), ["yes", 'no "never"\n', "🙂"], ["", "ye", "yesno", "no"]),
        (Constraint.from_regex(r"a/b\/[0-9]{2}\n?", "p"), ["a/b/12", "a/b/34\n"], ["a/b/1", "a/b/123"]),
        (Constraint.from_regex("^a|b$", "p"), ["a", "b"], ["ab", "c"]),
        (Constraint.from_regex("a\nb", "p"), ["a\nb"], ["ab"]),
        (Constraint.json_object("p"), ["{}", '{"a": [1, null]}'], ["[]", "1", " {}"]),
        (Constraint.from_schema(True, "p"), ["1", "null", '"x"'], ["", "x"]),
        (Constraint('start: "a" b+\nb: /[bc]/', "p"), ["ab", "abcb"], ["a", "b"]),
        (Constraint('root ::= "a" b+\nb ::= [bc]', "p"), ["ab", "abcb"], ["a", "b"]),
        (Constraint.from_choice(["x"], "p").after('"<think>" /[a-z]*/ "</think>"'), ["<think>hm</think>x"], ["x"]),
        (Constraint('root ::= "a" b+\nb ::= [bc]', "p").after('"-"'), ["-ab", "-abcb"], ["ab", "-a"]),
    ],
)
async def test_every_kind_of_constraint_admits_what_it_says(compiler, tokenizer, constraint, yes, no):
    grammar = await compiler.compile(constraint)

    assert [text for text in yes if not accepts(grammar, tokenizer, text)] == []
    assert [text for text in no if accepts(grammar, tokenizer, text)] == []


async def test_blanks_end(compiler, tokenizer):
    grammar = await compiler.compile(Constraint.json_object("p"))

    assert accepts(grammar, tokenizer, '{\n    "a": 1\n}')
    assert not accepts(grammar, tokenizer, '{\n\n"a": 1}')
    assert not accepts(grammar, tokenizer, '{  "a": 1}')


async def test_only_the_end_follows_what_is_complete(compiler, tokenizer):
    grammar = await compiler.compile(Constraint.from_choice(["a"], "p"))
    guide = grammar.guide()
    [token] = allowed(guide.mask())
    guide.advance(token)

    assert allowed(guide.mask()) == list(tokenizer.eos_token_ids)


async def test_the_end_waits_for_the_least_number_of_tokens(compiler, tokenizer):
    grammar = await compiler.compile(Constraint.from_regex("(ab?)*", "p"))
    ends = set(tokenizer.eos_token_ids)
    guide = grammar.guide(min_tokens=2)
    for least in (False, False, True):
        ids = allowed(guide.mask())
        assert bool(ends & set(ids)) == least
        guide.advance(next(token for token in ids if tokenizer.token_bytes(token) == b"a"))
    single = (await compiler.compile(Constraint.from_choice(["a"], "p"))).guide(min_tokens=5)
    single.advance(allowed(single.mask())[0])

    assert allowed(single.mask()) == sorted(ends)  # it cannot go on


async def test_a_token_that_is_not_allowed_is_an_error_and_guides_do_not_share_it(compiler, tokenizer):
    grammar = await compiler.compile(Constraint.from_choice(["a"], "p"))
    first, second = grammar.guide(), grammar.guide()
    first.advance(tokenizer.eos_token_ids[0])

    assert first.error is not None
    assert second.error is None and len(allowed(second.mask())) == 1


def chain(length: int) -> dict:
    """Each definition is made of the next one."""
    definitions = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$defs": {**definitions, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict:
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint.from_schema({"type": "objec"}, "p"), "Invalid type: objec"),
        (Constraint.from_schema({"type": "object", "required": 1}, "p"), "required"),
        (Constraint.from_schema({"$ref": "http://localhost/schema.json"}, "p"), "Resource"),
        (Constraint.from_schema({"not": {"type": "null"}}, "p"), "not"),
        (Constraint.from_schema(False, "p"), ""),
        (Constraint.from_schema(nested(200), "p"), "recursion"),
        (Constraint.from_schema(chain(3000), "p"), "too complex"),
        (Constraint.from_schema({"type": "integer", "multipleOf": 10**9 + 7}, "p"), "fuel"),
        (Constraint.from_regex("a(", "p"), "regex parse error: unclosed group"),
        (Constraint.from_regex("a(?=b)", "p"), "regex"),
        (Constraint.from_regex("(a{1000}){1000}", "p"), "too"),
        (Constraint("", "p"), ""),
        (Constraint("start: nothing", "p"), "nothing"),
        (Constraint("root ::= ((", "p"), "GBNF"),
        (Constraint("start: " + "(" * 100_000, "p"), "nested"),
        (Constraint("start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(9000)) + 'r9000: "a"', "p"), "too"),
        (Constraint("start: /" + "a" * (1 << 18) + "/", "p"), "characters"),
    ],
)
async def test_what_cannot_be_followed_is_the_requests_fault(byte_level, constraint, reason):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    with pytest.raises(InvalidRequest) as error:
        await compiler.compile(constraint)

    assert error.value.param == "p"
    assert error.value.message.startswith("`p` ") and "\n" not in error.value.message
    assert reason in error.value.message
    await compiler.compile(Constraint.json_object("p"))
    compiler.close()


async def test_what_is_lenient_leaves_out_what_cannot_be_enforced(compiler):
    schema = {"type": "string", "not": {"const": "x"}}
    with pytest.raises(InvalidRequest):
        await compiler.compile(Constraint.from_schema(schema, "p"))
    await compiler.compile(Constraint.from_schema(schema, "p", lenient=True))


async def test_a_grammar_is_compiled_once(compiler, monkeypatch):
    made = []
    make = compiler._make
    monkeypatch.setattr(compiler, "_make", lambda grammar, checker: made.append(grammar) or make(grammar, checker))
    constraints = [Constraint.from_choice([text], "p") for text in "aab"] * 3 + [Constraint.from_regex("(", "p")] * 2

    async def compile(constraint: Constraint) -> None:
        try:
            await compiler.compile(constraint)
        except InvalidRequest:
            assert constraint == constraints[-1]

    async with trio.open_nursery() as nursery:
        for constraint in constraints:
            nursery.start_soon(compile, constraint)

    assert sorted(made) == sorted({constraint.grammar for constraint in constraints})


async def test_what_is_kept_is_bounded(compiler, monkeypatch):
    monkeypatch.setattr(compiler_module, "MAX_KEPT", 3)
    for text in "abcdeca":
        await compiler.compile(Constraint.from_choice([text], "p"))

    assert [json.loads(grammar.split("CHOICE: ")[1]) for grammar in compiler._kept] == ["e", "c", "a"]


async def test_a_request_that_is_gone_leaves_the_others_theirs(compiler):
    constraint = Constraint.json_object("p")
    async with trio.open_nursery() as nursery:
        gone = trio.CancelScope()

        async def leader() -> None:
            with gone:
                await compiler.compile(constraint)

        nursery.start_soon(leader)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(compiler.compile, constraint)
        await trio.testing.wait_all_tasks_blocked()
        gone.cancel()


async def test_what_takes_too_long_is_given_up(byte_level, monkeypatch):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10, timeout=0.2)
    monkeypatch.setattr(checker_module, "PATIENCE", 300)
    slow = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(6000)}}
    with pytest.raises(InvalidRequest, match=r"too complex: it takes longer than 0\.2 s"):
        await compiler.compile(Constraint.from_schema(slow, "p"))

    monkeypatch.setattr(checker_module, "PATIENCE", 1)
    monkeypatch.setattr(checker_module, "COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(InvalidRequest, match=r"too complex: it takes longer than 0\.2 s"):
        await compiler.compile(Constraint.from_choice(["a"], "p"))

    assert compiler._checkers[0]._process is None


async def test_the_checker_may_be_killed(compiler):
    await compiler.compile(Constraint.json_object("p"))
    compiler._checkers[0]._process.kill()
    compiler._checkers[0]._process.wait()

    await compiler.compile(Constraint.from_choice(["a"], "p"))


class LateTimer:
    """Fires when it is told to, whether it was cancelled or not: its thread was on its way."""

    def __init__(self, seconds: float, function) -> None:
        self.fire = function
        LateTimer.made.append(self)

    made: ClassVar[list["LateTimer"]] = []

    def start(self) -> None: ...

    def cancel(self) -> None: ...


@pytest.mark.parametrize("when", ["before the answer is read", "after it is read", "while the next one is checked"])
def test_a_deadline_that_passes_with_the_answer_does_not_end_the_next_grammar(when, monkeypatch):
    monkeypatch.setattr(checker_module.threading, "Timer", LateTimer)
    monkeypatch.setattr(LateTimer, "made", [])
    ask, asked = checker_module._ask, []

    def ask_slowly(process, grammar):
        asked.append(grammar)
        if len(asked) == 2 and when == "while the next one is checked":
            LateTimer.made[0].fire()
        answer = ask(process, grammar)
        if len(asked) == 1 and when == "before the answer is read":
            LateTimer.made[0].fire()
        return answer

    monkeypatch.setattr(checker_module, "_ask", ask_slowly)
    checker = checker_module.Checker(timeout=5)
    try:
        for text in "ab":
            assert checker.check(f'start: "{text}"\n') == f'start: "{text}"\n'
            if when == "after it is read":
                LateTimer.made[0].fire()
    finally:
        checker.close()


async def test_hard_grammars_of_one_client_keep_no_other_waiting(byte_level, monkeypatch):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    patience, made = threading.Event(), []

    def make(grammar: str, checker: checker_module.Checker) -> str:
        made.append(grammar)
        if "hard" in grammar:
            patience.wait(30)
        return "refused"

    monkeypatch.setattr(compiler, "_make", make)

    async def compile(text: str, client: str) -> None:
        with pytest.raises(InvalidRequest):
            await compiler.compile(Constraint(text, "p"), client)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(compile, f"hard {number}", "one")
                await trio.testing.wait_all_tasks_blocked()
            for text in ("easy", "easier"):
                await compile(text, "other")
            assert sorted(made) == ["easier", "easy", "hard 0"]
            await compile("easy", "one")  # known
            patience.set()

    assert sorted(made) == ["easier", "easy", *(f"hard {number}" for number in range(5))]


async def test_what_was_begun_for_a_request_that_is_gone_holds_its_clients_turn_and_is_kept(byte_level, monkeypatch):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    patience, begun, made = threading.Event(), threading.Event(), []

    def make(grammar: str, checker: checker_module.Checker) -> str:
        made.append(grammar)
        begun.set()
        patience.wait(30)
        return "refused"

    monkeypatch.setattr(compiler, "_make", make)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(compiler.compile, Constraint(f"{number}", "p"), "one")
                await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
        assert made == ["0"]
        patience.set()
        with pytest.raises(InvalidRequest):
            await compiler.compile(Constraint("0", "p"), "one")

    assert made == ["0"]


async def test_a_panic_ends_its_requests_and_nothing_else(compiler, monkeypatch):
    class Panic(BaseException):
        """As Rust's are in Python."""

    def panic(grammar: str, checker: checker_module.Checker) -> None:
        raise Panic

    constraint = Constraint.from_choice(["a"], "p")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="could not be compiled") as caught:
        patch.setattr(compiler, "_make", panic)
        await compiler.compile(constraint)

    assert isinstance(caught.value.__cause__, Panic)
    await compiler.compile(constraint)


async def test_a_model_without_an_end_cannot_be_constrained(byte_level, monkeypatch):
    monkeypatch.setattr(byte_level, "eos_token_ids", ())
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    with pytest.raises(InvalidRequest, match="no token that ends"):
        await compiler.compile(Constraint.json_object("p"))
    compiler.close()


async def test_a_vocabulary_that_is_larger_than_the_model_is_cut(byte_level):
    size = byte_level.vocab_size - 5  # an added token and merges
    compiler = Compiler(byte_level, size, max_waiting=10)
    guide = (await compiler.compile(Constraint.from_regex("(.|\n)*", "p"))).guide()
    mask = guide.mask()
    compiler.close()

    assert len(mask) == -(-size // 32) * 4
    assert max(allowed(mask)) < size


def test_tokens_of_any_vocabulary_may_be_named():
    assert check('start: <[200018]> "a"\n') == 'start: <[200018]> "a"\n'
