"""The order of things: prepare every target, then level by level and round by round, targets taking turns within a round.

A closed loop: N workers, each sending its next request as soon as its last one has ended. Targets take turns, and change who
goes first, so that whatever else the machine does hits all of them alike.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import trio

from dashinfer.bench.client import DIALECTS, QUESTION, Content, ask, find_model, probe, read_answer, record
from dashinfer.bench.exchange import Connect, Recording, open_stream
from dashinfer.bench.prompts import calibrate, make_prompt
from dashinfer.bench.stats import Figures, Sample, summarise
from dashinfer.bench.target import Target

OnAnswer = Callable[[], None]  # called as each answer ends


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of every target. Lengths in tokens, times in seconds.

    With `images`, each prompt is a picture, of these sizes in turn, and a short question; `prompt_tokens` then says nothing.
    """

    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    rounds: int = 3
    requests: int | None = None  # a round; None: two a worker, but at least four
    prompt_tokens: int = 105
    output_tokens: int = 64
    seed: int = 0
    timeout: float = 600.0  # for one answer
    images: tuple[tuple[int, int], ...] = ()  # width and height in pixels
    image_format: Literal["png", "jpeg"] = "jpeg"

    def requests_at(self, concurrency: int) -> int:
        """Requests in a round: a multiple of the concurrency, so that the workers end close to each other."""
        wanted = self.requests if self.requests is not None else max(2 * concurrency, 4)
        return -(-wanted // concurrency) * concurrency

    @property
    def rate(self) -> str:
        """The figure that servers are compared by."""
        return "requests_per_second" if self.images else "tokens_per_second"


@dataclass
class Run:
    """One target's measurement, filled in as it goes."""

    target: Target
    dialect: str = ""
    answer: str = ""
    words: int = 0
    levels: dict[int, list[Figures]] = field(default_factory=dict)  # concurrency -> rounds
    errors: list[str] = field(default_factory=list)  # distinct ones, in order
    connect: Connect = open_stream


async def prepare(run: Run, settings: Settings) -> None:
    """Finds the model, the dialect and the prompts' number of words, and warms the server up. Raises BenchError."""
    if run.target.model is None:
        run.target = replace(run.target, model=await find_model(run.target, settings.timeout, run.connect))
    run.dialect, run.answer = await probe(run.target, settings.timeout, run.connect, _first_question(settings))
    extra = DIALECTS[run.dialect]

    async def count_tokens(prompt: str) -> int | None:
        return (await ask(run.target, prompt, 1, extra, settings.timeout, run.connect)).prompt_tokens

    if not settings.images:
        run.words = await calibrate(count_tokens, settings.prompt_tokens)
    most = max(settings.concurrency)
    prompts = make_prompts(run, settings, "warm-up", most)
    await closed_loop(run, prompts, most, settings)


def make_prompts(run: Run, settings: Settings, name: str, count: int) -> list[Content]:
    """Prompts that no other `name` has."""
    seeds = [f"{settings.seed} {name} {index}" for index in range(count)]
    if not settings.images:
        return [make_prompt(seed, run.words) for seed in seeds]
    from dashinfer.bench.pictures import draw, make_question

    sizes = itertools.cycle(settings.images)
    return [make_question(draw(seed, next(sizes)), settings.image_format) for seed in seeds]


def _first_question(settings: Settings) -> Content:
    if not settings.images:
        return QUESTION
    from dashinfer.bench.pictures import make_question, red_circle

    return make_question(red_circle(), settings.image_format)


async def closed_loop(
    run: Run, prompts: Sequence[Content], concurrency: int, settings: Settings, on_answer: OnAnswer = lambda: None
) -> list[Sample]:
    """Sends all prompts, `concurrency` at a time; samples in the order in which they ended.

    Answers are parsed when all have ended: parsing one would delay the reading of others that still stream.
    """
    waiting = iter(prompts)
    recordings: list[Recording] = []
    extra = DIALECTS[run.dialect]

    async def work() -> None:
        for prompt in waiting:  # one iterator for all workers: each takes the next prompt
            recordings.append(await record(run.target, prompt, settings.output_tokens, extra, settings.timeout, run.connect))
            on_answer()

    async with trio.open_nursery() as nursery:
        for _ in range(concurrency):
            nursery.start_soon(work)
    return [read_answer(recording) for recording in recordings]


def schedule(runs: Sequence[Run], settings: Settings) -> Iterator[tuple[int, int, Run]]:
    """(concurrency, round, run) in the order in which they are measured."""
    for concurrency in settings.concurrency:
        for number in range(settings.rounds):
            first = number % len(runs)
            for run in (*runs[first:], *runs[:first]):
                yield concurrency, number, run


async def measure_round(
    run: Run, concurrency: int, number: int, settings: Settings, on_answer: OnAnswer = lambda: None
) -> Figures:
    """Measures one round of one target, notes it in `run`, and returns its figures.

    Targets of one vocabulary get the same prompts in a round; no prompt comes up in two rounds.
    """
    requests = settings.requests_at(concurrency)
    prompts = make_prompts(run, settings, f"{concurrency} {number}", requests)
    samples = await closed_loop(run, prompts, concurrency, settings, on_answer)
    figures = summarise(samples)
    run.levels.setdefault(concurrency, []).append(figures)
    failures = dict.fromkeys(sample.error for sample in samples if sample.error is not None)
    run.errors.extend(error for error in failures if error not in run.errors)
    return figures
