"""Which of several copies of the model takes a request. Pure: it sees what the request would find in each, and nothing else."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

SLACK = 2  # sequences that a replica may have more than another one, whatever it has cached
WORTH = 8  # cached blocks for which it may have one more


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request would find in a replica.

    Attributes:
        cached_blocks: of its prompt, in the prefix cache.
        admits: whether it would run at once.
        sequences: that run or wait there.
        tokens: that they are still to compute, as far as is known: one for a sequence that decodes.
    """

    cached_blocks: int
    admits: bool
    sequences: int
    tokens: int


def choose(outlooks: Many[Outlook], turn: int = 0) -> int:
    """Which replica takes a request: the one with the most of its prompt in the prefix cache, of those with equally much the
    one with the fewest tokens to compute, of those with equally few the next from number `turn` on. But:

    - where some would run it at once, it waits for none of the others, whatever they have cached;
    - a replica is passed over whose sequences outnumber those of the one with the fewest by more than `SLACK`, and one for each
      `WORTH` blocks that it has cached: a beginning that all prompts share must not gather all of them in the first replica
      that computed it, and costs another one a single computation.
    """
    order = [(turn + offset) % len(outlooks) for offset in range(len(outlooks))]
    able = [number for number in order if outlooks[number].admits] or order
    fewest = min(outlooks[number].sequences for number in able)

    def overloaded(outlook: Outlook) -> bool:
        return outlook.sequences - fewest > SLACK + outlook.cached_blocks // WORTH

    fit = [number for number in able if not overloaded(outlooks[number])]
    return min(fit, key=lambda number: (-outlooks[number].cached_blocks, outlooks[number].tokens))
