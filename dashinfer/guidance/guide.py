"""A grammar that is compiled, and the guides of the sequences that follow it.

A guide knows what a sequence has said and which tokens may follow. Nothing here waits or knows of steps; a mask takes tens of
microseconds for most grammars, and milliseconds for some.
"""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

SLOW = 2e-3  # seconds for a mask, from which on a sequence's masks are computed in a thread


class Grammar:
    """For any number of sequences.

    Attributes:
        ends: tokens that end an output; a grammar allows them where it is satisfied.
        param: the request's field that it came from.
    """

    def __init__(self, matcher: "LLMatcher", *, ends: tuple[int, ...], vocab_size: int, param: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.ends = ends
        self.param = param

    def guide(self, min_tokens: int = 0) -> "Guide":
        """For one new sequence, which does not end before so many tokens if the grammar lets it go on."""
        return Guide(self._matcher.deep_copy(), self.ends, self._vocab_size, min_tokens, self.param)


class Guide:
    """One sequence's.

    Attributes:
        error: why the sequence cannot go on, or None.
        slow: its last mask took long.
        param: the request's field that the grammar came from.
    """

    __slots__ = ("_count", "_ends", "_length", "_matcher", "_min_tokens", "error", "param", "slow")

    def __init__(self, matcher: "LLMatcher", ends: tuple[int, ...], vocab_size: int, min_tokens: int, param: str) -> None:
        self._matcher = matcher
        self._ends = ends
        self._length = -(-vocab_size // 32) * 4
        self._min_tokens = min_tokens
        self._count = 0
        self.error: str | None = None
        self.slow = False
        self.param = param

    def advance(self, token: int) -> None:
        """The sequence has said this. Sets `error` where it must not or the grammar is too much work."""
        self._count += 1
        if not self._matcher.consume_token(token) and self.error is None:
            self.error = self._matcher.get_error() or "a token that the grammar does not allow"

    def forced(self) -> list[int]:
        """Tokens that follow and can be no others; not all of them, where the tokens of a text depend on what comes next."""
        return self._matcher.compute_ff_tokens()

    def mask(self) -> bytes:
        """A bit for each token that may follow, lowest first, in 32-bit words; at least one is 1. Sets `error` where the
        grammar is too much work; the mask then allows everything."""
        begun = time.perf_counter()
        mask = self._matcher.compute_bitmask()[: self._length]
        self.slow = time.perf_counter() - begun > SLOW
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return b"\xff" * self._length
        return self._without_ends(mask) if self._count < self._min_tokens else mask

    def _without_ends(self, mask: bytes) -> bytes:
        longer = bytearray(mask)
        for token in self._ends:
            longer[token >> 3] &= ~(1 << (token & 7))
        return bytes(longer) if any(longer) else mask
