"""`Compiler`: constraints to grammars that sequences can follow, off the event loop, and kept for the next request.

A grammar comes from a client. It is tried in another process first, which may be killed over it, and whatever it does there is
a 400 of its own request.
"""

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

import trio

from dashinfer.errors import InvalidRequest, QueueFull
from dashinfer.guidance.checker import Checker
from dashinfer.guidance.guide import Grammar
from dashinfer.guidance.matching import MAX_LENGTH, new_matcher
from dashinfer.guidance.spec import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from dashinfer.text.tokenizer import Tokenizer

TIMEOUT = 5.0  # seconds to compile one
MAX_KEPT = 256  # grammars, refused ones included
MAX_KEPT_LENGTH = 8 << 20  # characters of them


class Compiler:
    """For one model.

    Args:
        vocab_size: number of logits.
        max_waiting: requests that wait for their grammars at most.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, *, max_waiting: int, timeout: float = TIMEOUT) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_waiting = max_waiting
        self._checker = Checker(timeout=timeout)
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher | str] = OrderedDict()  # grammar -> compiled, or why it cannot be
        self._kept_length = 0
        self._compiling: dict[str, trio.Event] = {}
        self._limiter = trio.CapacityLimiter(1)  # grammars are checked one by one

    async def compile(self, constraint: Constraint) -> Grammar:
        """The grammar, compiled.

        Raises:
            InvalidRequest: it cannot be used; names `constraint.param`.
            QueueFull: too many requests wait for theirs.
            InternalError: the server cannot check grammars.
        """
        key = constraint.grammar
        if len(key) > MAX_LENGTH:
            raise InvalidRequest(
                f"`{constraint.param}` makes a grammar of {len(key)} characters; at most {MAX_LENGTH} are allowed",
                param=constraint.param,
            )
        while key not in self._kept:
            if (other := self._compiling.get(key)) is not None:
                await other.wait()
            else:
                await self._compile(key)
        self._kept.move_to_end(key)
        found = self._kept[key]
        if isinstance(found, str):
            raise InvalidRequest(f"`{constraint.param}` cannot be followed: {found}", param=constraint.param)
        return Grammar(found, ends=self._ends, vocab_size=self._vocab_size, param=constraint.param)

    def close(self) -> None:
        """End the process that checks grammars; it starts again when it is needed."""
        self._checker.close()

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(token for token in self._tokenizer.eos_token_ids if 0 <= token < self._vocab_size)

    async def _compile(self, grammar: str) -> None:
        if (waiting := self._limiter.statistics().tasks_waiting) >= self._max_waiting:
            raise QueueFull(f"{waiting} requests wait for their grammars already; try again later")
        self._compiling[grammar] = trio.Event()
        try:
            work = partial(self._make, grammar)
            self._keep(grammar, await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter))
        finally:
            self._compiling.pop(grammar).set()

    def _make(self, grammar: str) -> "LLMatcher | str":
        try:
            lark = self._checker.check(grammar)
            if self._vocabulary is None:
                from dashinfer.guidance.vocabulary import make_vocabulary

                self._vocabulary = make_vocabulary(self._tokenizer, self._vocab_size)
        except ValueError as error:
            return str(error)
        matcher = new_matcher(self._vocabulary, lark)
        matcher.compute_bitmask()  # sequences begin with what it finds out
        return matcher.get_error() or matcher

    def _keep(self, grammar: str, made: "LLMatcher | str") -> None:
        self._kept[grammar] = made
        self._kept_length += len(grammar)
        while len(self._kept) > MAX_KEPT or (self._kept_length > MAX_KEPT_LENGTH and len(self._kept) > 1):
            self._kept_length -= len(self._kept.popitem(last=False)[0])
