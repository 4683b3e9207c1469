"""One request's handle on the engine: its sequences on one side, the stream of their tokens on the other.

Entering the `with` block queues the request, leaving it ends what is left of it. The engine feeds it without ever waiting: the
channel is as long as all the tokens the request may still get.
"""

from collections.abc import Callable
from types import TracebackType

import trio

from dashinfer.engine.api import TokenOutput
from dashinfer.engine.scheduler import Update
from dashinfer.engine.sequence import Sequence
from dashinfer.errors import RequestError
from dashinfer.types import SamplingParams


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
        *,
        on_enter: Callable[["SequenceGroup"], None],
        on_exit: Callable[["SequenceGroup"], None],
        on_stop: Callable[[Sequence], None],
    ) -> None:
        self.sequences = [Sequence(len(prompt), list(prompt), each) for each in params]
        self._index = {id(sequence): index for index, sequence in enumerate(self.sequences)}
        self._open = set(range(len(params)))  # choices that the reader still expects something of
        self._on_enter = on_enter
        self._on_exit = on_exit
        self._on_stop = on_stop
        self._error: RequestError | None = None
        self._send, self._receive = trio.open_memory_channel[TokenOutput](sum(each.max_tokens for each in params))

    @property
    def cached_tokens(self) -> int:
        return self.sequences[0].cached_tokens

    def __enter__(self) -> "SequenceGroup":
        self._on_enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._receive.close()
        self._send.close()
        self._on_exit(self)

    async def receive(self) -> list[TokenOutput]:
        while self._open:
            try:
                outputs = [await self._receive.receive()]
            except trio.EndOfChannel:
                assert self._error is not None
                raise self._error from None
            while True:
                try:
                    outputs.append(self._receive.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            outputs = [output for output in outputs if output.index in self._open]
            self._open.difference_update(output.index for output in outputs if output.finish)
            if outputs:
                return outputs
        return []

    def stop(self, index: int) -> None:
        self._open.discard(index)
        self._on_stop(self.sequences[index])

    def deliver(self, update: Update) -> None:
        """Pass on what a step gave one of the sequences."""
        index = self._index[id(update.sequence)]
        self._send.send_nowait(TokenOutput(index, update.token, update.logprobs, update.finish))

    def fail(self, error: RequestError) -> None:
        """End the reader's stream with an error, after what it has not read yet."""
        if self._error is None:
            self._error = error
            self._send.close()
