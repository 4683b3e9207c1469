"""The order of things: prepare every target, then level by level and round by round, targets taking turns within a round.

Targets take turns, and change who goes first, so that whatever else the machine does hits all of them alike.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import trio

from dashinfer.bench.client import DIALECTS, QUESTION, Content, ask, find_model, probe, read_answer, record
from dashinfer.bench.exchange import Connect, Recording, open_stream
from dashinfer.bench.load import arrivals, closed_loop, open_loop
from dashinfer.bench.prompts import calibrate
from dashinfer.bench.questions import Question, picture_questions, random_questions, shuffled
from dashinfer.bench.settings import Settings
from dashinfer.bench.stats import Figures, Sample, summarise
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

POLL_SECONDS = 0.5
BACK_OFF_SECONDS = 0.1  # after a request that found no server

OnAnswer = Callable[[], None]  # called as each answer ends


@dataclass
class Run:
    """One target's measurement, filled in as it goes.

    Attributes:
        dataset: a file's questions; empty for prompts that are drawn.
        levels: rounds by concurrency or request rate.
        samples: those of each round, beside `levels`.
        errors: distinct ones, in order.
    """

    target: Target
    dataset: Sequence[Question] = ()
    dialect: str = ""
    answer: str = ""
    words: int = 0  # in a prompt
    tokens_per_word: float = 1.0
    levels: dict[float, list[Figures]] = field(default_factory=dict)
    samples: dict[float, list[list[Sample]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    connect: Connect = open_stream
    _file: Iterator[Question] | None = None

    def questions(self, settings: Settings, name: str) -> Iterator[Question]:
        """Questions without end. Those drawn come up under no other `name`; a file's go on where they stopped."""
        if self.dataset:
            self._file = self._file or shuffled(self.dataset, settings.seed)
            return self._file
        if settings.images:
            return picture_questions(settings, name)
        return random_questions(settings, name, self.words, self.tokens_per_word)


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A request that was answered, or failed; answers are parsed when a round is over, not while others still stream."""

    question: Question
    recording: Recording
    due: float | None

    def sample(self) -> Sample:
        return replace(read_answer(self.recording), due=self.due, wanted_tokens=self.question.output_tokens)


async def prepare(run: Run, settings: Settings) -> None:
    """Finds the model, the dialect and the prompts' number of words, and warms the server up. Raises BenchError."""
    limit, connect, endpoint = settings.timeout, run.connect, settings.endpoint
    await _first_answer(run, settings)
    extra = DIALECTS[run.dialect]

    async def count_tokens(prompt: str) -> int | None:
        return (await ask(run.target, prompt, 1, extra, limit, connect, endpoint=endpoint)).prompt_tokens

    if not settings.images and not run.dataset:
        run.words, run.tokens_per_word = await calibrate(count_tokens, settings.prompt_tokens)
    if count := settings.warmup_requests:
        workers = count if settings.open else max(settings.concurrency)
        await warm_up(run, settings, count, workers)


async def _first_answer(run: Run, settings: Settings) -> None:
    """Finds the model and the dialect, of a server that may not have started yet. Raises BenchError."""
    limit, question = settings.timeout, _first_question(settings)
    end = trio.current_time() + settings.wait
    while True:
        try:
            if run.target.model is None:
                run.target = replace(run.target, model=await find_model(run.target, limit, run.connect))
            run.dialect, run.answer = await probe(run.target, limit, run.connect, question, settings.endpoint)
            return
        except BenchError:
            if trio.current_time() >= end:
                raise
        await trio.sleep(POLL_SECONDS)


async def warm_up(run: Run, settings: Settings, count: int, workers: int) -> None:
    """So many requests in a closed loop, which leave no trace in `run`."""

    async def send(question: Question) -> None:
        await _send(run, question, settings)

    questions = list(itertools.islice(run.questions(settings, "warm-up"), count))
    await closed_loop(send, questions, min(workers, count))


async def _send(run: Run, question: Question, settings: Settings) -> Recording:
    return await record(
        run.target,
        question.content,
        question.output_tokens,
        DIALECTS[run.dialect],
        settings.timeout,
        run.connect,
        endpoint=settings.endpoint,
        before=question.before,
    )


def _first_question(settings: Settings) -> Content:
    if not settings.images:
        return QUESTION
    from dashinfer.bench.pictures import make_question, red_circle

    return make_question(red_circle(), settings.image_format)


def schedule(runs: Sequence[Run], settings: Settings) -> Iterator[tuple[float, int, Run]]:
    """(level, round, run) in the order in which they are measured."""
    for level in settings.levels:
        for number in range(settings.rounds):
            first = number % len(runs)
            for run in (*runs[first:], *runs[:first]):
                yield level, number, run


async def measure_round(run: Run, level: float, number: int, settings: Settings, on_answer: OnAnswer = lambda: None) -> Figures:
    """Measures one round of one target and notes it in `run`; when cancelled, what was answered until then.

    Targets of one vocabulary get the same prompts in a round; no random prompt comes up in two rounds.
    """
    name = f"{level:g} {number}"
    count = settings.requests_at(level)
    questions = run.questions(settings, name)
    if count is not None:
        questions = iter(list(itertools.islice(questions, count)))  # drawn before the round, not in it
    sent: list[_Sent] = []

    async def send(question: Question, due: float | None = None) -> None:
        recording = await _send(run, question, settings)
        sent.append(_Sent(question=question, recording=recording, due=due))
        on_answer()
        if recording.failure is not None and settings.duration is not None:
            await trio.sleep(BACK_OFF_SECONDS)  # else a server that is gone fails as many requests as there is memory for

    figures = None
    seconds = math.inf if settings.duration is None else settings.duration
    try:
        if settings.open:
            offsets = itertools.takewhile(
                lambda offset: offset < seconds, arrivals(level, settings.arrivals, f"{settings.seed} {name} arrivals")
            )
            await open_loop(send, questions, offsets, settings.max_concurrency or math.inf)
        else:
            await closed_loop(send, questions, int(level), seconds)
    finally:
        if sent:
            figures = _note(run, level, [each.sample() for each in sent], settings)
    assert figures is not None, "a round has requests"
    return figures


def _note(run: Run, level: float, samples: list[Sample], settings: Settings) -> Figures:
    figures = summarise(samples, settings.percentiles, dict(settings.goodput), settings.metrics())
    run.levels.setdefault(level, []).append(figures)
    run.samples.setdefault(level, []).append(samples)
    failures = dict.fromkeys(sample.error for sample in samples if sample.error is not None)
    run.errors.extend(error for error in failures if error not in run.errors)
    return figures
