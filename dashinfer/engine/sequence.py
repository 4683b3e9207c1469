"""One sequence: its tokens, how far they are computed, and what it holds of the engine's resources.

Plain state that the scheduler alone changes. All positions count from the first prompt token.
"""

from dataclasses import dataclass, field

from dashinfer.engine.api import PromptMedia
from dashinfer.guidance.guide import Guide
from dashinfer.types import SamplingParams, TokenLogprobs


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens that are known, plus up to two that a rank has sampled or will sample and the parent does not know yet."""

    prompt_length: int
    tokens: list[int]  # prompt, then output
    params: SamplingParams
    media: PromptMedia | None = None
    guide: Guide | None = None  # where its output follows a grammar; it knows the output tokens that are known
    blocks: list[int] = field(default_factory=list)  # the block table
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of `tokens`
    slot: int | None = None  # None: waiting or ended
    computed: int = 0  # positions whose keys and values are computed by plans made so far
    registered: int = 0  # leading blocks known to the prefix cache
    in_flight: int = 0  # tokens that plans made so far will sample
    told: int = 0  # leading tokens that the ranks have or will have sampled
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache at the first admission
    admitted: bool = False  # ran at least once
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the second token of the prompt, and so on
    embedding: bytes | None = None  # of the prompt, float32 little endian
    held: set[bytes] = field(default_factory=set)  # keys of media that it pins, or wants while it waits
    ended: bool = False

    @property
    def num_output(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.prompt_length

    @property
    def length(self) -> int:
        """Tokens, the ones in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def num_to_compute(self) -> int:
        """Positions that the next plan may compute; 0 when the last output token is in flight, which needs no computing."""
        if self.num_output + self.in_flight >= self.params.max_tokens:
            return 0
        return self.length - self.computed
