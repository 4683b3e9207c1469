"""A rank's images and videos: encoded between steps, a slice at a time; their embeddings kept until the parent forgets them.
Each rank of several encodes everything, and tells the others nothing of it.

What waits together is encoded together, up to a number of patches. A video's steps in time do not see each other in a tower, so
a long one is encoded in pieces, and takes no more memory at a time than a large image. Everything is queued on the stream that
steps run on: embeddings that are here may be used by the next step.

Where memory runs out, less is encoded together for a while; a medium is given up when there is not enough for it by itself.
"""

import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dashinfer.errors import InsufficientMemory
from dashinfer.models.towers import Tower
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_qwen import VisionOutput
from dashinfer.types import Encode
from dashinfer.worker.capacity import out_of_memory

BATCH_PATCHES = {"cpu": 4096, "cuda": 16384}
SETTINGS = "--max-pixels, --media-cache-memory or --max-batch"  # that save memory
GOOD_BATCHES = 16  # after which batches may be twice as large again


@dataclass(frozen=True)
class _Piece:
    """Some steps in time of a medium, usually all."""

    message: Encode
    start: int  # the first of its patches
    grid: Grid
    last: bool

    @property
    def patches(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class _Batch:
    pieces: list[_Piece]
    steps: Generator[None, None, VisionOutput]


class Media:
    """What was asked for, in the order of asking, and the embeddings that are here.

    Args:
        name: of the model, for messages.
        dtype: that embeddings are kept in.
        batch_patches: that are encoded together; a single image, or a step of a video, may have more.
        together: whether several media may be encoded at once, which changes how products are rounded.

    Raises:
        InsufficientMemory: from `finish`, where there is not enough of it for what is needed.
    """

    def __init__(
        self,
        tower: Tower,
        vision: VisionConfig,
        *,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        batch_patches: int,
        together: bool = True,
    ) -> None:
        self._tower, self._vision = tower, vision
        self._name = name
        self._dtype = dtype
        self._batch_patches = self._most_patches = batch_patches
        self._together = together
        self._good = 0  # batches since memory ran out
        self._asked: dict[bytes, Encode] = {}  # and not encoded yet
        self._waiting: deque[_Piece] = deque()
        self._batch: _Batch | None = None
        self._parts: dict[bytes, list[VisionOutput]] = {}  # of media in pieces
        self._embeddings: dict[bytes, VisionOutput] = {}
        self._new: list[bytes] = []
        self._given_up: dict[bytes, InsufficientMemory] = {}  # and not forgotten yet
        self._failed: dict[bytes, InsufficientMemory] = {}  # of those, since the last call
        self._slice = _Slice() if device.type == "cuda" else None
        self._pinned = device.type == "cuda"  # a copy from other memory would wait for the steps before it

    @property
    def pending(self) -> bool:
        """Whether there is something to encode."""
        return bool(self._asked)

    @property
    def running(self) -> bool:
        """Whether the device is still busy with the last slice, behind which another one would only delay the next step."""
        return self._slice is not None and self._slice.running

    def __getitem__(self, key: bytes) -> VisionOutput:
        """The embeddings of a medium that is encoded."""
        return self._embeddings[key]

    def ask(self, message: Encode) -> None:
        """Encode this, sooner or later."""
        steps, rows, columns = message.grid
        area, side = rows * columns, self._vision.merge_size
        assert steps > 0 and area > 0 and rows % side == columns % side == 0
        assert len(message.patches) == steps * area * self._vision.patch_dim
        assert message.key not in self._asked and message.key not in self._embeddings
        self._asked[message.key] = message
        self._waiting.extend(_cut(message, self._steps_at_once(message)))

    def forget(self, keys: Iterable[bytes]) -> None:
        """Drop these, whether encoded, being encoded or waiting. Keys that are not known do not matter."""
        for key in keys:
            self._asked.pop(key, None)
            self._parts.pop(key, None)
            self._embeddings.pop(key, None)
            self._given_up.pop(key, None)
            self._failed.pop(key, None)
        self._new = [key for key in self._new if key in self._embeddings]
        self._waiting = deque(filter(self._is_asked, self._waiting))  # the others hold patches
        if self._batch is not None and not any(map(self._is_asked, self._batch.pieces)):
            self._batch = None

    def advance(self, seconds: float) -> None:
        """Encode for about so long, a block of the tower at least."""
        with torch.inference_mode():
            if self._slice is None:
                end = time.perf_counter() + seconds
                self._step()
                while self.pending and time.perf_counter() < end:
                    self._step()
                return
            planned, queued = self._slice.begin(seconds), 0
            while queued < planned:
                self._step()
                queued += 1
                if self._batch is None:
                    break
            self._slice.end(queued, same_again=self._batch is not None)

    def finish(self, keys: Iterable[bytes]) -> None:
        """Have the embeddings of these, which were asked for, encoded now."""
        with torch.inference_mode():
            for key in keys:
                while key not in self._embeddings:
                    if key in self._given_up:
                        raise InsufficientMemory(str(self._given_up[key]))
                    assert key in self._asked, "a plan needs embeddings that nobody asked for"
                    self._step()

    def take_new(self) -> list[bytes]:
        """Those encoded since the last call."""
        new, self._new = self._new, []
        return new

    def take_failed(self) -> dict[bytes, InsufficientMemory]:
        """Those given up since the last call, and why."""
        failed, self._failed = self._failed, {}
        return failed

    def _steps_at_once(self, message: Encode) -> int:
        """Of a video."""
        return max(1, self._batch_patches // math.prod(message.grid[1:]))

    def _is_asked(self, piece: _Piece) -> bool:
        return self._asked.get(piece.message.key) is piece.message

    def _step(self) -> None:
        """One block of the tower."""
        try:
            with out_of_memory(self._name, f"while images were encoded; lower {SETTINGS}"):
                if self._batch is None:
                    self._batch = self._next_batch()
                self._advance(self._batch)
        except InsufficientMemory as error:
            if not self._make_smaller():
                key = self._waiting[0].message.key
                self.forget([key])
                # without its traceback, whose frames have what was allocated until then
                self._given_up[key] = self._failed[key] = InsufficientMemory(str(error))

    def _advance(self, batch: _Batch) -> None:
        try:
            next(batch.steps)
        except StopIteration as end:
            self._batch = None
            try:
                self._keep(batch.pieces, end.value)
            except BaseException:
                self._begin_anew(batch.pieces)
                raise
            if self._parts:  # which may have to be begun anew at their end, and then for the last time if batches stay small
                return
            self._good += 1
            if self._good % GOOD_BATCHES == 0:
                self._batch_patches = min(2 * self._batch_patches, self._most_patches)
        except BaseException:  # it cannot go on, and is begun anew if anybody asks
            self._waiting.extendleft(filter(self._is_asked, reversed(batch.pieces)))
            self._batch = None
            raise

    def _make_smaller(self) -> bool:
        """Memory ran out for what is next: have less of it encoded together. False: it is one step in time of one medium."""
        pieces = self._next_pieces()
        patches = sum(piece.patches for piece in pieces)
        if len(pieces) == 1:
            piece = pieces[0]
            if piece.grid[0] == 1:
                return False
            self._waiting.popleft()
            self._waiting.extendleft(reversed(_cut(piece.message, -(-piece.grid[0] // 2), piece)))
        self._batch_patches = patches // 2
        self._good = 0
        return True

    def _begin_anew(self, pieces: Sequence[_Piece]) -> None:
        """Encode all of the media of these pieces again that are not here."""
        messages = {piece.message.key: piece.message for piece in pieces if self._is_asked(piece)}
        self._waiting = deque(piece for piece in self._waiting if piece.message.key not in messages)
        for key, message in reversed(messages.items()):
            self._parts.pop(key, None)
            self._waiting.extendleft(reversed(_cut(message, self._steps_at_once(message))))

    def _next_pieces(self) -> list[_Piece]:
        """Those that are encoded together next; at least one."""
        pieces: list[_Piece] = []
        total = 0
        for piece in self._waiting:
            if pieces and (total + piece.patches > self._batch_patches or not self._together):
                break
            pieces.append(piece)
            total += piece.patches
        return pieces

    def _next_batch(self) -> _Batch:
        pieces = self._next_pieces()
        assert pieces
        total = sum(piece.patches for piece in pieces)
        patches = torch.empty(total, self._vision.patch_dim, dtype=torch.uint8, pin_memory=self._pinned)
        rows, end = patches.numpy(), 0
        for piece in pieces:
            size, width = piece.patches, self._vision.patch_dim
            values = np.frombuffer(piece.message.patches, np.uint8, size * width, piece.start * width)
            rows[end : end + size] = values.reshape(size, width)
            end += size
        batch = _Batch(pieces, self._tower.steps(patches, [piece.grid for piece in pieces]))
        for _ in pieces:
            self._waiting.popleft()
        return batch

    def _keep(self, pieces: Sequence[_Piece], output: VisionOutput) -> None:
        end = 0
        for piece in pieces:
            begin, end = end, end + self._vision.num_tokens(piece.grid)
            if not self._is_asked(piece):
                continue
            key = piece.message.key
            parts = self._parts.setdefault(key, [])
            parts.append(VisionOutput(output.embeddings[begin:end], tuple(level[begin:end] for level in output.deepstack)))
            if piece.last:
                self._embeddings[key] = self._joined(self._parts.pop(key))
                del self._asked[key]
                self._new.append(key)
        assert end == len(output.embeddings)

    def _joined(self, parts: Sequence[VisionOutput]) -> VisionOutput:
        """One after the other, in memory of their own."""
        levels = zip(*(part.deepstack for part in parts), strict=True)
        return VisionOutput(
            torch.cat([part.embeddings for part in parts]).to(self._dtype),
            tuple(torch.cat(level).to(self._dtype) for level in levels),
        )


def _cut(message: Encode, at_once: int, within: _Piece | None = None) -> list[_Piece]:
    """A medium, or one of its pieces, in pieces of so many steps in time."""
    steps, rows, columns = message.grid if within is None else within.grid
    start, last = (0, True) if within is None else (within.start, within.last)
    return [
        _Piece(
            message,
            start + first * rows * columns,
            (min(at_once, steps - first), rows, columns),
            last=last and first + at_once >= steps,
        )
        for first in range(0, steps, at_once)
    ]


class _Slice:
    """Blocks queued on a GPU together, and how long such blocks take there."""

    def __init__(self) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # around the slice, until it has ended
        self._begun: torch.cuda.Event | None = None
        self._blocks = 0
        self._block_seconds: float | None = None  # of the batch at hand, where it is known
        self._same_again = False

    @property
    def running(self) -> bool:
        if self._events is None:
            return False
        begun, ended = self._events
        if not ended.query():
            return True
        self._block_seconds = begun.elapsed_time(ended) / 1e3 / self._blocks if self._same_again else None
        self._events = None
        return False

    def begin(self, seconds: float) -> int:
        """How many blocks to queue now, as many as take about `seconds`."""
        self._begun = torch.cuda.Event(enable_timing=True)
        self._begun.record()
        return 1 if self._block_seconds is None else max(1, int(seconds / max(self._block_seconds, 1e-6)))

    def end(self, blocks: int, *, same_again: bool) -> None:
        """So many were queued; `same_again`: more of their batch are to come."""
        assert self._begun is not None
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._events, self._blocks, self._same_again = (self._begun, ended), blocks, same_again
