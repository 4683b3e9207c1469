"""What is measured and how, the same for every target: frozen, checked once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dashinfer.errors import BenchError

METRICS = ("ttft", "tpot", "itl", "e2e")  # what a mark can be set for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of every target. Lengths in tokens, times in seconds.

    The load is a closed loop of `concurrency` workers, or, with `request_rate`, an open one, in which requests are sent when
    they are due. Prompts are random words, those of `dataset`, or, with `images`, pictures of these sizes in turn, each with a
    short question.

    Raises:
        BenchError: two of the settings do not go together.
    """

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    request_rate: tuple[float, ...] = ()  # requests/s; `inf` sends all at once
    arrivals: Literal["poisson", "constant"] = "poisson"
    max_concurrency: int | None = None  # of an open loop
    rounds: int = 3
    requests: int | None = None  # a round; None: see `requests_at`
    duration: float | None = None  # of a round, in place of a number of requests
    warmup: int | None = None  # requests; None: the highest concurrency, or 4 for an open loop
    endpoint: Literal["chat", "completions"] = "chat"
    prompt_tokens: int = 105
    output_tokens: int = 64
    range_ratio: float = 0.0  # lengths are drawn from 1 - this to 1 + this of the two above
    shared_prefix: int = 0  # of a prompt's tokens, the same in others
    prefixes: int = 1  # different ones of that length, in turn
    dataset: str | None = None  # a file's name
    images: tuple[tuple[int, int], ...] = ()  # width and height in pixels
    image_format: Literal["png", "jpeg"] = "jpeg"
    seed: int = 0
    timeout: float = 600.0  # for one answer
    wait: float = 0.0  # for a server that does not answer yet
    percentiles: tuple[float, ...] = (50, 90, 99)
    goodput: tuple[tuple[str, float], ...] = ()  # (metric, seconds): what a good request keeps to

    def __post_init__(self) -> None:
        refusals = {
            "--dataset says what is asked; it goes with none of --images, --range-ratio and --shared-prefix": self.dataset
            and (self.images or self.range_ratio or self.shared_prefix),
            "--images sets the prompts; it goes with none of --range-ratio and --shared-prefix": self.images
            and (self.range_ratio or self.shared_prefix),
            "--images needs --endpoint chat": self.images and self.endpoint != "chat",
            "--images needs --requests, not --duration: pictures are drawn before a round": self.images and self.duration,
            "--max-concurrency bounds --request-rate; without it, --concurrency is what you want": self.max_concurrency
            and not self.request_rate,
            "--duration needs a finite --request-rate": self.duration and math.inf in self.request_rate,
            "--range-ratio is not from 0 to below 1": not 0 <= self.range_ratio < 1,
            "--shared-prefix is not shorter than the shortest of the --prompt-tokens": self.shared_prefix
            and self.shared_prefix >= self.prompt_tokens * (1 - self.range_ratio),
        }
        for refusal, refused in refusals.items():
            if refused:
                raise BenchError(refusal)

    @property
    def open(self) -> bool:
        """Whether requests are sent when they are due, not when others have ended."""
        return bool(self.request_rate)

    @property
    def levels(self) -> Sequence[float]:
        """What rounds differ in: the concurrency, or the request rate."""
        return self.request_rate or self.concurrency

    def requests_at(self, level: float) -> int | None:
        """Requests in a round; None where its duration decides.

        In a closed loop, two a worker unless set, at least four, and a multiple of the concurrency, so that workers end close
        to each other. In an open one, ten seconds' worth unless set, at least four, and 64 at once.
        """
        if self.duration is not None:
            return None
        if self.open:
            return self.requests or (64 if math.isinf(level) else max(math.ceil(10 * level), 4))
        workers = int(level)
        return -(-(self.requests or max(2 * workers, 4)) // workers) * workers

    @property
    def warmup_requests(self) -> int:
        return self.warmup if self.warmup is not None else 4 if self.open else max(self.concurrency)

    @property
    def rate(self) -> str:
        """The figure that servers are compared by."""
        return "requests_per_second" if self.images else "tokens_per_second"

    def metrics(self) -> Iterator[str]:
        """Of which times figures are made; `late` is how long after it was due a request was sent."""
        yield from METRICS
        if self.open:
            yield "late"
