"""A rank is killed under a running stream: how long the stream is silent, and whether it tells the same as an undisturbed one.

Drives a server over HTTP; of its processes it knows only that ranks are children that run `dashinfer.worker`.
"""

import itertools
import json
import os
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import psutil
import trio

from dashinfer.bench.client import DIALECTS, EventParser, find_model, probe, read_answer, record
from dashinfer.bench.exchange import Recording, Response
from dashinfer.bench.prompts import calibrate, make_prompt
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

MARK = 3.0  # seconds beside loading the weights


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One rank killed under one stream.

    Attributes:
        seconds: from SIGKILL to the first text after the silence that follows it.
        silence: seconds without text, the longest in the stream after the kill.
        same: whether the whole answer is that of an undisturbed request.
    """

    seconds: float
    silence: float
    same: bool


@dataclass(kw_only=True)
class Recovery:
    """One server. Times in seconds; `weights` is what loading them takes a server that starts."""

    label: str
    ranks: int
    weights: float
    start: float  # from the start of its ranks until they are ready
    kills: list[Kill] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(kill.seconds for kill in self.kills)

    @property
    def worst(self) -> float:
        return max(kill.seconds for kill in self.kills)

    @property
    def holds(self) -> bool:
        """Whether the worst keeps to the mark, and no answer is another."""
        return self.worst < MARK + self.weights and all(kill.same for kill in self.kills)


def read_pieces(response: Response) -> list[tuple[float, str]]:
    """Pieces of a streamed answer's text, and when each arrived.

    Raises:
        BenchError: it is not a complete answer.
    """
    if response.status != 200 or response.error is not None:
        raise BenchError(f"a stream failed: {response.error or f'HTTP {response.status}'}")
    parser, pieces, ended = EventParser(), [], False
    for now, data in response.body:
        for payload in parser.feed(data):
            if payload == b"[DONE]":
                ended = True
                continue
            chunk = json.loads(payload)
            if "error" in chunk:
                raise BenchError(f"a stream failed: {chunk['error']}")
            texts = [(choice.get("delta") or {}).get("content") for choice in chunk.get("choices") or ()]
            pieces += [(now, text) for text in texts if text]
    if not ended:
        raise BenchError("a stream broke off")
    return pieces


def after_silence(times: Sequence[float], killed: float) -> tuple[float, float]:
    """When text came again after the longest silence that ends after the kill, and how long that was.

    What was on its way at the time of the kill still arrives, so the first text after it need not be a new token.

    Raises:
        BenchError: the stream had not begun by then, or had ended.
    """
    pairs = [(new - old, new) for old, new in itertools.pairwise(times) if new > killed]
    if not times or times[0] > killed or not pairs:
        raise BenchError("the kill did not hit a running stream; change --after or --output-tokens")
    silence, new = max(pairs)
    return new, silence


def find_ranks(server: int) -> list[int]:
    """Process ids of a server's ranks, the oldest first."""
    children = psutil.Process(server).children()
    ranks = [child for child in children if "dashinfer.worker" in child.cmdline()]
    return [child.pid for child in sorted(ranks, key=psutil.Process.create_time)]


async def kill_ranks(
    target: Target,
    server: int,
    *,
    kills: int,
    after: float,
    prompt_tokens: int,
    output_tokens: int,
    limit: float,
    on_kill: Callable[[Kill], None],
) -> list[Kill]:
    """Kill so many ranks of a server, in turn, each under a stream of its own.

    Args:
        server: its process id.
        after: seconds from the request to the kill.
        limit: seconds for an answer.

    Raises:
        BenchError: a stream failed, or was not running at its kill.
    """
    target = replace(target, model=await find_model(target, limit))
    dialect, _ = await probe(target, limit)
    extra = DIALECTS[dialect]

    async def count_tokens(prompt: str) -> int | None:
        return read_answer(await record(target, prompt, 1, extra, limit)).prompt_tokens

    words, _ = await calibrate(count_tokens, prompt_tokens)
    done = []
    for number in range(kills):
        prompt = make_prompt(f"kill {number}", words)

        async def ask(prompt: str = prompt) -> Recording:
            return await record(target, prompt, output_tokens, extra, limit)

        expected = read_pieces((await ask()).response())
        killed = 0.0

        async def kill(number: int = number) -> None:
            nonlocal killed
            await trio.sleep(after)
            ranks = find_ranks(server)
            if not ranks:
                raise BenchError(f"{target.label} has no rank to kill")
            killed = trio.current_time()
            os.kill(ranks[number % len(ranks)], signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            recording = await ask()
        pieces = read_pieces(recording.response())
        again, silence = after_silence([when for when, _ in pieces], killed)
        same = "".join(text for _, text in pieces) == "".join(text for _, text in expected)
        done.append(Kill(seconds=again - killed, silence=silence, same=same))
        on_kill(done[-1])
    return done
