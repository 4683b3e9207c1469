"""What happens after ranks have failed: when they start again, and whose request is given up rather than computed once more.

A failure is a *strike* against every sequence that was being computed; a token clears its strikes. One with two strikes is a
*suspect*, to be computed alone, so that the next failure has one possible cause. The one that has been struck three times while
it was alone is given up: a request that ends a rank every time costs three restarts, five if it began in company, and takes no
other with it. Those with fewer strikes come first, so failures by chance, even every few seconds, strike another one each time.

Pure policy over hashable sequences: no clock, no ranks, no requests.
"""

from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from msgspec import Struct

SUSPICIOUS = 2  # strikes
GIVEN_UP = 3  # strikes while it was alone
DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0)  # seconds before a restart, by failures in a row
GOOD_STEPS = 64  # after which steps may be twice as large again

S = TypeVar("S", bound=Hashable)


class Verdict(Struct, Generic[S], frozen=True):
    """What follows from a failure.

    Attributes:
        delay: seconds until the ranks start again; None: they do not, the server cannot recover.
        culprits: suspects that were alone.
        victims: given up because failures are too frequent to compute their like again.
    """

    delay: float | None
    culprits: list[S]
    victims: list[S]


class Recovery(Generic[S]):
    """Gives up what is being computed at more than `max_restarts` failures within `window` seconds, and everything at more than
    `max_restarts` failures in a row without a step between them."""

    def __init__(self, *, max_restarts: int, window: float) -> None:
        self._max_restarts = max_restarts
        self._window = window
        self._strikes: dict[S, int] = {}
        self._alone: dict[S, int] = {}  # those of them at which nothing else was computed
        self._failures: deque[float] = deque()  # when they were, within the window
        self._row = 0  # failures since a step, without those of suspects, of which there is an end

    def failure(self, struck: Iterable[S], *, now: float, idle: float = 0.0) -> Verdict[S]:
        """The ranks failed at `now`, in seconds, while `struck` were computed. `idle`: how long they had had nothing to do."""
        struck = list(struck)
        if idle > self._window:
            self._row = 0
        self._failures.append(now)
        while self._failures[0] < now - self._window:
            self._failures.popleft()
        found_out = len(struck) == 1 and self.is_suspect(struck[0])
        for sequence in struck:
            self._strikes[sequence] = self._strikes.get(sequence, 0) + 1
        if len(struck) == 1:
            self._alone[struck[0]] = self._alone.get(struck[0], 0) + 1
        culprits = [sequence for sequence in struck if len(struck) == 1 and self._alone[sequence] >= GIVEN_UP]
        too_many = len(self._failures) > self._max_restarts
        victims = [sequence for sequence in struck if too_many and sequence not in culprits]
        for sequence in (*culprits, *victims):
            self.forget(sequence)
        if not found_out:
            self._row += 1
        if self._row > self._max_restarts:
            return Verdict(None, culprits, victims)
        return Verdict(DELAYS[min(max(self._row, 1), len(DELAYS)) - 1], culprits, victims)

    def step(self) -> None:
        """A step has a result."""
        self._row = 0

    def token(self, sequence: S) -> None:
        """A sequence has gained a token."""
        self.forget(sequence)

    def forget(self, sequence: S) -> None:
        """Nothing is held against a sequence any more."""
        self._strikes.pop(sequence, None)
        self._alone.pop(sequence, None)

    def is_suspect(self, sequence: S) -> bool:
        return self._strikes.get(sequence, 0) >= SUSPICIOUS

    def suspect(self) -> S | None:
        """The next sequence to be computed alone, of those with the fewest strikes the first; None: there is none."""
        suspects = filter(self.is_suspect, self._strikes)
        return min(suspects, key=self._strikes.__getitem__, default=None)


class StepLimits:
    """How large a step may be: smaller after one that ran out of memory, and by and by as large as before.

    Attributes:
        sequences: that may run.
        tokens: of one step, at least one for each sequence.
    """

    def __init__(self, *, sequences: int, tokens: int, least: int) -> None:
        """`least`: tokens of the smallest step."""
        self.sequences = self._most_sequences = sequences
        self.tokens = self._most_tokens = tokens
        self._least = min(least, tokens)
        self._good = 0

    def shrink(self, sequences: int, tokens: int) -> bool:
        """Memory ran out in a step of so many. False: there is none smaller."""
        if sequences == 1 and tokens <= self._least:
            return False
        self.sequences = max(1, sequences // 2)
        self.tokens = max(self._least, self.sequences, tokens // 2)
        self._good = 0
        return True

    def good_step(self) -> None:
        """A step has a result."""
        if self.tokens == self._most_tokens and self.sequences == self._most_sequences:
            return
        self._good += 1
        if self._good == GOOD_STEPS:
            self._good = 0
            self.sequences = min(2 * self.sequences, self._most_sequences)
            self.tokens = min(2 * self.tokens, self._most_tokens)
