"""When to plan the step after the running one: late, so that what arrives meanwhile is in it, and yet before it is needed.

A plan is made in a millisecond, and a step of a large prompt on a CPU takes a second: planned at once, the next step would
leave out all that arrives in that second. Where steps take milliseconds, as on a GPU, there is no time but to plan at once.
"""

SHARE = 0.8  # of a step's expected time; the rest is for steps that are quicker than expected
LEAD = 0.005  # seconds that a plan may take to be made, sent and read
CAUTION = 0.2  # of a longer time than expected, that the expectation grows by; it shrinks at once


class Pace:
    """What steps took, in seconds a token, by size: a class for each doubling of the tokens."""

    def __init__(self) -> None:
        self._rates: dict[int, float] = {}

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        rate = seconds / tokens
        known = self._rates.get(tokens.bit_length(), rate)
        self._rates[tokens.bit_length()] = min(rate, known + CAUTION * (rate - known))

    def delay(self, tokens: int) -> float:
        """Seconds from the begin of such a step to the planning of the next; 0 where nothing is known of its size."""
        return max(0.0, SHARE * self._rates.get(tokens.bit_length(), 0.0) * tokens - LEAD)
