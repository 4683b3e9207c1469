"""`Compiler`: constraints to grammars that sequences can follow, off the event loop, and kept for the next request.

A grammar comes from a client. It is tried in another process first, which may be killed over it, and whatever it does there is
a 400 of its own request. There are a few such processes, and a client has one of them at most: its hard grammars keep nobody's
requests waiting but its own.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from dashinfer.errors import InternalError, InvalidRequest
from dashinfer.guidance.checker import Checker
from dashinfer.guidance.guide import Grammar
from dashinfer.guidance.matching import MAX_LENGTH, new_matcher
from dashinfer.guidance.spec import Constraint
from dashinfer.guidance.turns import Ticket, Turns

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from dashinfer.text.tokenizer import Tokenizer

TIMEOUT = 5.0  # seconds to compile one
CHECKERS = 2  # processes that check grammars; one until two clients need them at a time
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
        self._checkers = [Checker(timeout=timeout) for _ in range(CHECKERS)]
        self._free = self._checkers.copy()
        self._turns = Turns(places=CHECKERS, most_waiting=max_waiting)
        self._vocabulary: LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher | str] = OrderedDict()  # grammar -> compiled, or why it cannot be
        self._kept_length = 0

    async def compile(self, constraint: Constraint, client: Hashable = None) -> Grammar:
        """The grammar, compiled. `client`: who asks, of those who take turns.

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
        if key in self._kept:
            self._kept.move_to_end(key)
            found = self._kept[key]
        else:
            found = await self._check(key, client)
        if isinstance(found, str):
            raise InvalidRequest(f"`{constraint.param}` cannot be followed: {found}", param=constraint.param)
        return Grammar(found, ends=self._ends, vocab_size=self._vocab_size, param=constraint.param)

    def close(self) -> None:
        """End the processes that check grammars; they start again when they are needed."""
        for checker in self._checkers:
            checker.close()

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(token for token in self._tokenizer.eos_token_ids if 0 <= token < self._vocab_size)

    async def _check(self, grammar: str, client: Hashable) -> "LLMatcher | str":
        ticket = self._turns.join(client, grammar)
        self._begin()
        try:
            await ticket.settled.wait()
        finally:
            self._turns.leave(ticket)
        if isinstance(ticket.found, Exception):
            raise ticket.found
        return ticket.found

    def _begin(self) -> None:
        """Start the checks that there are places for, each in a thread that no request's end stops."""
        while (ticket := self._turns.begin()) is not None:
            checker = self._free.pop(0)
            end = partial(trio.lowlevel.current_trio_token().run_sync_soon, self._end, ticket, checker)
            try:
                trio.lowlevel.start_thread_soon(partial(self._make, ticket.grammar, checker), partial(_deliver, end))
            except RuntimeError as error:  # the system has no thread to spare
                self._free.insert(0, checker)
                self._turns.end(ticket, InternalError(f"grammars cannot be checked: {error}"))

    def _end(self, ticket: Ticket, checker: Checker, outcome: Any) -> None:
        self._free.insert(0, checker)  # its process runs already
        try:
            found = outcome.unwrap()
            self._keep(ticket.grammar, found)
        except Exception as error:  # which is every waiting request's
            found = error
        except BaseException as error:  # such as a panic in Rust, which is no reason for the server's end
            found = RuntimeError("a grammar could not be compiled")
            found.__cause__ = error
        self._turns.end(ticket, found)
        self._begin()

    def _make(self, grammar: str, checker: Checker) -> "LLMatcher | str":
        try:
            lark = checker.check(grammar)
            with self._vocabulary_lock:
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


def _deliver(end: Callable[..., None], outcome: Any) -> None:
    with suppress(trio.RunFinishedError):
        end(outcome)
