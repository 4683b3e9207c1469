"""`Intake`: the images and videos of a request, from URLs to patches.

All media of a request go their way at the same time: each is fetched, measured by its header, and only then decoded and cut, in
a thread. What does not fit into the model's context is refused before anything is decoded. A failure, or the end of the
request, cancels the rest. Memory is bounded by a budget for all requests together: files while they are held, and patches for
as long as the request lasts; the pictures being decoded come on top, one for each thread.
"""

import hashlib
import math
import os
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from dashinfer.engine.api import Medium
from dashinfer.errors import ContextLengthExceeded, InvalidRequest, MediaError, RequestError
from dashinfer.types import MAX_FRAME_BYTES, Grid
from dashinfer.vision.budget import MediaAccount, MediaBudget
from dashinfer.vision.decode import MAX_PIXELS, check_pixels, decode_picture
from dashinfer.vision.fetch import fetch
from dashinfer.vision.header import read_header
from dashinfer.vision.model import VisionModel
from dashinfer.vision.network import Internet, Network
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.preprocess import ImageProcessor, Patches, Processor
from dashinfer.vision.request import LOW_DETAIL_PIXELS, MediumKind, MediumRequest
from dashinfer.vision.sampling import VideoProcessor
from dashinfer.vision.video import FRAME_RATE, VideoLimits, VideoPatches, decode_frames, decode_video, probe_video

MAX_MEDIA = 128  # of a request
MAX_MEDIUM_BYTES = MAX_FRAME_BYTES - 4096  # of patches, which a rank gets in one frame
MAX_TOTAL_PIXELS = 1_000_000_000  # of a request's pictures, as they come
MEMORY = 2**30  # bytes that files and patches of all requests may take together

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seen:
    """An image or a video that is ready for the engine.

    Attributes:
        seconds_per_step: of a video, between temporal steps.
        timestamps: of a video, in seconds, of each temporal step.
    """

    kind: MediumKind
    medium: Medium
    seconds_per_step: float = 1.0
    timestamps: Sequence[float] = ()


class Intake:
    """Attributes:
    vision: the model.
    budget: of the memory for media; a request's account is opened there.
    """

    def __init__(
        self,
        vision: VisionModel,
        policy: MediaPolicy,
        *,
        max_waiting: int,
        memory: int = MEMORY,
        network: Network | None = None,
    ) -> None:
        """`max_waiting`: requests that may wait for memory."""
        self.vision = vision
        self.budget = MediaBudget(memory, max_waiting=max_waiting)
        self.policy = policy
        self.network = network or Internet()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Half of the cores: the model may run on them too. Videos, which take long, leave the other half of those to images.
        threads = max(2, min(8, cores // 2))
        self.image_cutters = trio.CapacityLimiter(threads)
        self.video_cutters = trio.CapacityLimiter(threads // 2)
        self.readers = trio.CapacityLimiter(2)  # of headers and data: URLs, which hold the interpreter's lock

    async def take(self, requests: Sequence[MediumRequest], account: MediaAccount, *, max_tokens: int) -> list[Seen]:
        """The media of one request in order. The account is settled then: it holds the patches.

        Raises:
            MediaError: of the first medium that fails, with its index and param; the others are cancelled.
            ContextLengthExceeded: they become `max_tokens` tokens or more.
            InvalidRequest: too many, or bounds that leave the server's.
            QueueFull: too many requests wait for memory.
        """
        if len(requests) > MAX_MEDIA:
            raise InvalidRequest(
                f"there are {len(requests)} images and videos; a request may have {MAX_MEDIA}", param="messages"
            )
        passage = _Passage(self, account, max_tokens)
        found = await _all([partial(passage.take, index, request) for index, request in enumerate(requests)])
        account.settle(sum(len(patches) for patches in {each.medium.key: each.medium.patches for each in found}.values()))
        return found


async def _all(works: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of works that run at the same time. Raises RequestError of the first that fails; the others are cancelled."""
    results: dict[int, T] = {}
    failure: RequestError | None = None

    async def run(number: int) -> None:
        nonlocal failure
        try:
            results[number] = await works[number]()
        except RequestError as error:
            failure = failure or error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for number in range(len(works)):
            nursery.start_soon(run, number)
    if failure is not None:
        raise failure
    return [results[number] for number in range(len(works))]


class _Passage:
    """The media of one request on their way."""

    def __init__(self, intake: Intake, account: MediaAccount, max_tokens: int) -> None:
        self._intake = intake
        self._account = account
        self._places = trio.CapacityLimiter(intake.policy.concurrency)
        self._max_tokens = max_tokens
        self._tokens = self._pixels = 0

    async def take(self, index: int, request: MediumRequest) -> Seen:
        """One of them. Raises MediaError with its index."""
        try:
            if request.kind == "image":
                return await self._image(request.sources[0], self._image_processor(request))
            video = self._intake.vision.video.limited(request.max_frames)
            if request.frames:
                return await self._frames(request.sources, video, request.fps)
            return await self._video(request.sources[0], video, request.fps)
        except MediaError as error:
            raise MediaError(error.reason, index=index, param=request.param) from error

    def _image_processor(self, request: MediumRequest) -> ImageProcessor:
        image, most = self._intake.vision.image, request.max_pixels
        if most is None and request.low_detail:
            most = min(max(LOW_DETAIL_PIXELS, image.min_pixels, request.min_pixels or 0), image.max_pixels)
        try:
            return image.bounded(min_pixels=request.min_pixels, max_pixels=most)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=request.param) from error

    async def _image(self, source: str, processor: ImageProcessor) -> Seen:
        content, height, width = await self._fetch_picture(source, max_pixels=MAX_PIXELS)
        await self._make_room(processor.grid(height, width), processor)

        def cut() -> Seen:
            picture = decode_picture(content)
            trio.from_thread.check_cancelled()
            patches = processor.patches(picture)
            return self._seen("image", patches, processor)

        seen = await self._cut("image", cut)
        self._account.give(len(content))
        return seen

    async def _video(self, source: str, processor: VideoProcessor, fps: float | None) -> Seen:
        content = await self._fetch(source)
        info = await self._cut("video", partial(probe_video, content, check=trio.from_thread.check_cancelled))
        frames = len(processor.sample(info.frames, info.fps, fps))
        await self._make_room(processor.grid(frames, info.height, info.width), processor)

        def cut() -> Seen:
            return self._seen_video(
                decode_video(content, processor, fps=fps, check=trio.from_thread.check_cancelled), processor
            )

        seen = await self._cut("video", cut)
        self._account.give(len(content))
        return seen

    async def _frames(self, sources: Sequence[str], processor: VideoProcessor, fps: float | None) -> Seen:
        if len(sources) > processor.max_frames:
            raise MediaError(f"it has {len(sources)} frames, more than {processor.max_frames}")

        async def fetch_frame(number: int) -> tuple[bytes, int, int]:
            try:
                return await self._fetch_picture(sources[number], max_pixels=VideoLimits().frame_pixels)
            except MediaError as error:
                raise MediaError(f"frame {number}: {error.reason}") from error

        fetched = await _all([partial(fetch_frame, number) for number in range(len(sources))])
        contents = [content for content, _, _ in fetched]
        await self._make_room(processor.grid(len(contents), *fetched[0][1:]), processor)

        def cut() -> Seen:
            patches = decode_frames(contents, processor, fps=fps or FRAME_RATE, check=trio.from_thread.check_cancelled)
            return self._seen_video(patches, processor)

        seen = await self._cut("video", cut)
        self._account.give(sum(map(len, contents)))
        return seen

    async def _fetch_picture(self, source: str, *, max_pixels: int) -> tuple[bytes, int, int]:
        """An image file with its height and width in pixels."""
        content = await self._fetch(source)
        header = await trio.to_thread.run_sync(read_header, content, limiter=self._intake.readers)
        check_pixels(header.width, header.height, max_pixels=max_pixels)
        self._pixels += header.width * header.height
        if self._pixels > MAX_TOTAL_PIXELS:
            raise MediaError(f"with it, the request's pictures have more than {MAX_TOTAL_PIXELS} pixels together")
        return content, header.height, header.width

    async def _fetch(self, source: str) -> bytes:
        """A file. Its bytes are on the account, to be given back."""
        intake, account, paid = self._intake, self._account, 0

        async def make_room(size: int) -> None:
            nonlocal paid
            if size > paid:
                await account.take(size - paid)
                paid = size

        async with self._places:
            content = await fetch(source, intake.policy, network=intake.network, make_room=make_room, threads=intake.readers)
        await make_room(len(content))
        account.give(paid - len(content))
        return content

    async def _make_room(self, grid: Grid, processor: Processor) -> None:
        """Takes what the patches of `grid` need. Raises ContextLengthExceeded where the model has no room for their tokens."""
        self._tokens += processor.tokens_of(grid)
        if self._tokens >= self._max_tokens:
            raise ContextLengthExceeded(
                f"prompt is too long: this model's maximum context length is {self._max_tokens} tokens, and the images and "
                f"videos become {self._tokens} or more: give fewer or smaller ones (max_pixels, detail, fps), or start the "
                "server with a larger --max-length",
                param="messages",
            )
        if (size := math.prod(grid) * processor.patch_dim) > MAX_MEDIUM_BYTES:
            raise MediaError(
                f"it becomes {size} bytes of patches, more than {MAX_MEDIUM_BYTES}: give fewer or smaller frames "
                "(max_pixels, fps, max_frames)"
            )
        await self._account.take(size)

    async def _cut(self, kind: MediumKind, work: Callable[[], T]) -> T:
        """Something long in a thread. It is waited for even if it is cancelled, because its memory is in use until it ends."""
        limiter = self._intake.image_cutters if kind == "image" else self._intake.video_cutters
        return await trio.to_thread.run_sync(work, limiter=limiter)

    def _seen_video(self, patches: VideoPatches, processor: Processor) -> Seen:
        return self._seen("video", patches, processor, patches.seconds_per_step, patches.timestamps)

    def _seen(
        self,
        kind: MediumKind,
        patches: Patches,
        processor: Processor,
        seconds_per_step: float = 1.0,
        timestamps: Sequence[float] = (),
    ) -> Seen:
        content = patches.values.tobytes()
        # Where time moves the positions of a video's tokens, it makes another content for a cache of keys and values.
        timed = kind == "video" and self._intake.vision.config.tokens_per_second is not None
        digest = hashlib.sha256(struct.pack("<5s3qd", kind.encode(), *patches.grid, seconds_per_step if timed else 0.0))
        digest.update(content)
        medium = Medium(digest.digest(), patches.grid, content, processor.tokens_of(patches.grid))
        return Seen(kind, medium, seconds_per_step, timestamps)
