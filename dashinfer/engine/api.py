"""What the HTTP layer sees of the engine, and the engine of its ranks; nothing else.

`Generation` is a request's handle. It is used in a `with` block, and leaving the block for any reason ends the request: the
engine drops its sequences and frees their blocks in the next step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import trio
from msgspec import Struct

from dashinfer.guidance.guide import Grammar
from dashinfer.types import (
    Encoded,
    FinishReason,
    FromParent,
    Grid,
    MediaSpan,
    OutOfMemory,
    Progress,
    Ready,
    SamplingParams,
    StepResult,
    TokenLogprobs,
)

EngineState = Literal["loading", "ready", "recovering", "draining", "failed"]  # recovering: ranks start again; requests wait


class TokenOutput(Struct, frozen=True):
    """One token of one choice. `finish` is set on the last one; a token that ended the choice (end of sequence, a stop token)
    is reported too, with finish "stop", and is not part of the text."""

    index: int  # which choice
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a video, prepared.

    Attributes:
        key: SHA-256 of grid and patches.
        patches: uint8, as `dashinfer.types.Encode` has them.
        tokens: how many embeddings it becomes.
    """

    key: bytes
    grid: Grid
    patches: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class PromptMedia:
    """What a prompt shows.

    Attributes:
        media: each content once.
        spans: the places in the prompt that take embeddings, ascending.
        positions: [3, prompt] int32 little endian, see `dashinfer.types.Enter`.
        delta: see there.
    """

    media: tuple[Medium, ...]
    spans: tuple[MediaSpan, ...]
    positions: bytes
    delta: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    running: int  # sequences
    waiting: int  # sequences, preempted ones included
    total_blocks: int
    used_blocks: int  # held by running sequences
    cached_blocks: int  # held by nobody, kept for prefix hits
    preemptions: int
    prompt_tokens: int  # since start
    generated_tokens: int
    media_queries: int = 0  # images and videos that a sequence asked for
    media_hits: int = 0  # of those, encoded already or about to be
    restarts: int = 0  # of workers, after failures


class Generation(Protocol):
    """A submitted request with `n` choices."""

    cached_tokens: int  # of the prompt, found in the prefix cache; final once the first output is there
    prompt_logprobs: list[TokenLogprobs]  # of the prompt's tokens from the second on, if asked for; there with the first output
    embedding: bytes | None  # of the prompt, float32 little endian [hidden], if asked for; there with the first output
    queue_time: float | None  # seconds until the first step that computes some of it; None before

    async def receive(self) -> list[TokenOutput]:
        """All outputs that are ready, at least one. An empty list once every choice has finished or was stopped.

        Raises:
            InvalidRequest: the request's grammar turned out to be too much work.
            InternalError: the engine lost the request, or the model gave no finite logits for it.
            EngineUnavailable: the server shut down before the request was done.
        """
        ...

    def stop(self, index: int) -> None:
        """End one choice now (a stop string was seen). Nothing more of it is received."""
        ...


class EngineAPI(Protocol):
    state: EngineState
    info: Ready | None  # the model, once it is loaded

    def submit(
        self,
        prompt: list[int],
        params: list[SamplingParams],
        media: PromptMedia | None = None,
        grammar: Grammar | None = None,
    ) -> AbstractContextManager[Generation]:
        """Queue one request with a choice for each of `params` (they may differ in their seeds), each of which follows the
        grammar if there is one.

        Raises, at once and not on entering:
            EngineUnavailable: loading, draining or failed.
            QueueFull: `max_queue` requests wait already, none of which can start before others end.
            ContextLengthExceeded: the prompt leaves no room for one token.
            InvalidRequest: an empty prompt, or a token id outside of the vocabulary.
        """
        ...

    def stats(self) -> EngineStats: ...


class Workers(Protocol):
    """A group of ranks that hold one model."""

    async def run(
        self,
        *,
        on_progress: Callable[[Progress], None],
        on_result: Callable[[StepResult], None],
        on_encoded: Callable[[Encoded], None],
        on_memory: Callable[[OutOfMemory], None],
        task_status: trio.TaskStatus[Ready],
    ) -> None:
        """The group's one life, until it fails or is cancelled; started once all ranks are ready.

        Raises:
            StartupError, WorkerError: what ended it. No rank is left then.
        """
        ...

    async def send(self, message: FromParent) -> None:
        """To every rank, and `Masks` to the one that samples.

        Raises:
            WorkerError: one is gone.
        """
        ...
