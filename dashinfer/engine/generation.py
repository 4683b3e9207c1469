"""One request's handle on the engine: its sequences on one side, the stream of their tokens on the other.

Entering the `with` block queues the request, leaving it ends what is left of it. The engine feeds it without ever waiting: what
the reader has not taken yet is a list, which never holds more than the tokens the request may get.
"""

from collections.abc import Callable
from types import TracebackType

import msgspec
import trio

from dashinfer.engine.api import PromptMedia, TokenOutput
from dashinfer.engine.scheduler import Update
from dashinfer.engine.sequence import Sequence
from dashinfer.errors import RequestError
from dashinfer.guidance.guide import Grammar
from dashinfer.types import SamplingParams, TokenLogprobs


def _guided(params: SamplingParams, grammar: Grammar) -> SamplingParams:
    """The grammar says when the end may come, and that it must."""
    ends = tuple(sorted({*params.stop_token_ids, *grammar.ends}))
    return msgspec.structs.replace(params, stop_token_ids=ends, min_tokens=0)


class SequenceGroup:
    """A request with one sequence a choice. Implements `dashinfer.engine.api.Generation`.

    Args:
        on_enter: called when the `with` block is entered.
        on_exit: called when it is left.
        on_stop: called with a sequence of which nothing more is wanted.
    """

    def __init__(
        self,
        prompt: list[int],
        params: list[SamplingParams],
        media: PromptMedia | None = None,
        grammar: Grammar | None = None,
        *,
        on_enter: Callable[["SequenceGroup"], None],
        on_exit: Callable[["SequenceGroup"], None],
        on_stop: Callable[[Sequence], None],
    ) -> None:
        guides = [None if grammar is None else grammar.guide(each.min_tokens) for each in params]
        if grammar is not None:
            params = [_guided(each, grammar) for each in params]
        self.sequences = [
            Sequence(len(prompt), list(prompt), each, media, guide) for each, guide in zip(params, guides, strict=True)
        ]
        self._index = {sequence: index for index, sequence in enumerate(self.sequences)}
        self._open = set(range(len(params)))  # choices that the reader still expects something of
        self.queue_time: float | None = None
        self._entered = 0.0  # trio's time
        self._on_enter = on_enter
        self._on_exit = on_exit
        self._on_stop = on_stop
        self._error: RequestError | None = None
        self._ready: list[TokenOutput] = []
        self._changed = trio.Event()

    @property
    def cached_tokens(self) -> int:
        return self.sequences[0].cached_tokens

    @property
    def embedding(self) -> bytes | None:
        return self.sequences[0].embedding

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        return self.sequences[0].prompt_logprobs

    def __enter__(self) -> "SequenceGroup":
        self._entered = trio.current_time()
        self._on_enter(self)
        return self

    def admitted(self) -> None:
        """One of the sequences runs."""
        if self.queue_time is None:
            self.queue_time = trio.current_time() - self._entered

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._on_exit(self)

    async def receive(self) -> list[TokenOutput]:
        if not self._open:
            return []
        # A list and an event: a channel would cost several times as much, once a token.
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._changed = trio.Event()
            await self._changed.wait()
        outputs, self._ready = self._ready, []
        for output in outputs:
            if output.finish:
                self._open.discard(output.index)
        return outputs

    def stop(self, index: int) -> None:
        self._open.discard(index)
        self._ready = [output for output in self._ready if output.index != index]
        self._on_stop(self.sequences[index])

    def deliver(self, update: Update) -> None:
        """Pass on what a step gave one of the sequences."""
        index = self._index[update.sequence]
        self._ready.append(TokenOutput(index, update.token, update.logprobs, update.finish))
        self._changed.set()

    def fail(self, error: RequestError) -> None:
        """End the reader's stream with an error, after what it has not read yet."""
        if self._error is None:
            self._error = error
            self._changed.set()
