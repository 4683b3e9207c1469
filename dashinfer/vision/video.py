"""Videos to patches: GIF by Pillow, MP4 and WebM by PyAV, and lists of pictures.

A file's frames are sampled, and each sampled one is resized and cut as soon as it is decoded: memory is the patches and a
frame or two, never a whole decoded video. Size, length and codec are checked before the first frame is decoded; containers
and codecs are those on the lists here, so that no playlist or subtitle demuxer ever sees a client's file. All of it is plain
synchronous code for a thread.

Where a container says that its pictures are to be shown turned, they are turned. transformers' PyAV reader does not.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn

from dashinfer.errors import MediaError

from .container import is_complete
from .decode import check_pixels, decode_image, refusing_damage, to_rgb
from .gif import scan_gif
from .preprocess import Patches
from .sampling import VideoProcessor

if TYPE_CHECKING:
    import numpy as np
    from av.container import InputContainer

SUPPORTED = "MP4, WebM and GIF"
_DEMUXERS = {"mp4": "mov", "webm": "matroska"}
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4")
_DECODERS = (*_CODECS, "libvpx", "libvpx-vp9", "libdav1d", "libaom-av1")
_THREADS = 4
FRAME_RATE = 24.0  # frames a second that transformers takes a list of frames for


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Bounds on a video file, in pixels of a frame, frames, and pixels of all frames: up to the last sampled one, every frame
    has to be decoded."""

    frame_pixels: int = 4096 * 2304
    frames: int = 36_000  # 20 minutes at 30 a second
    pixels: int = 40_000_000_000  # 10 minutes of 1080p at 30 a second


_LIMITS = VideoLimits()


def _go_on() -> None:
    """Nobody asks to stop."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a container says of its video: pixels of a frame as stored, frames, and frames a second on average."""

    format: Literal["gif", "mp4", "webm"]
    width: int
    height: int
    frames: int
    fps: float


@dataclass(frozen=True, slots=True, eq=False)
class VideoPatches(Patches):
    """A video, cut.

    Attributes:
        timestamps: seconds of each of the grid's temporal steps (Qwen3-VL).
        seconds_per_step: seconds between two of them (Qwen2.5-VL's `second_per_grid_ts`).
    """

    timestamps: list[float]
    seconds_per_step: float


def probe_video(data: bytes, limits: VideoLimits = _LIMITS, *, check: Callable[[], None] = _go_on) -> VideoInfo:
    """Reads the container `data` without decoding: with `VideoProcessor.sample` and `grid` it gives the number of tokens.

    `check` is called now and then, and may raise to end it.

    Raises:
        MediaError: a container or codec that is not supported, more or larger frames than allowed, or a damaged file.
    """
    kind = _format(data)
    if kind == "gif":
        gif = scan_gif(data, max_frames=limits.frames)
        info = VideoInfo("gif", gif.width, gif.height, len(gif.delays), len(gif.delays) / sum(gif.delays))
    else:
        if not is_complete(data):
            raise MediaError("it is incomplete")
        with _open(data, limits) as container, refusing_damage():
            info = _probe(container, kind, limits, check)
    if info.width < 1 or info.height < 1:
        raise MediaError("it is damaged or incomplete: its header gives it no pixels")
    check_pixels(info.width, info.height, max_pixels=limits.frame_pixels)
    if info.frames * info.width * info.height > limits.pixels:
        raise MediaError(
            f"it has {info.frames} frames of {info.width} x {info.height} pixels, more than {limits.pixels} pixels in all"
        )
    return info


def decode_video(
    data: bytes,
    processor: VideoProcessor,
    limits: VideoLimits = _LIMITS,
    *,
    fps: float | None = None,
    check: Callable[[], None] = _go_on,
) -> VideoPatches:
    """Samples, decodes and cuts a video file. `fps` is how many frames a request wants of a second; `check` is called for each
    frame, and may raise to end it.

    Raises MediaError as `probe_video` does, and for an aspect ratio that the model refuses.
    """
    info = probe_video(data, limits, check=check)
    indexes = processor.sample(info.frames, info.fps, fps)
    planned = processor.grid(len(indexes), info.height, info.width)
    read = _gif_frames if info.format == "gif" else _av_frames
    values, grid = _cut(read(data, indexes, limits, check), len(indexes), processor, most=math.prod(planned))
    step = processor.temporal_patch_size
    seconds = step * info.frames / (len(indexes) * info.fps)
    return VideoPatches(values, grid, processor.timestamps(indexes, info.fps), seconds)


def cut_frames(frames: Sequence["np.ndarray"], processor: VideoProcessor, *, fps: float = FRAME_RATE) -> VideoPatches:
    """Cuts a list of pictures, uint8 [height, width, 3] each and all of one size, as a video of which no frame is left out.

    `fps` is how many of them a second has; 24 is what transformers assumes.

    Raises MediaError for an empty list, pictures of different sizes, and an aspect ratio that the model refuses.
    """
    if not frames:
        raise MediaError("it has no frames")
    return _cut_all(iter(frames), len(frames), processor, fps)


def decode_frames(
    files: Sequence[bytes], processor: VideoProcessor, *, fps: float = FRAME_RATE, check: Callable[[], None] = _go_on
) -> VideoPatches:
    """The same of image files, decoded one at a time. `check` is called for each, and may raise to end it.

    Raises MediaError as `cut_frames` does, and for a file that cannot be decoded.
    """
    if not files:
        raise MediaError("it has no frames")

    def decoded() -> Iterator["np.ndarray"]:
        for number, data in enumerate(files):
            check()
            try:
                yield decode_image(data, max_pixels=_LIMITS.frame_pixels)
            except MediaError as error:
                raise MediaError(f"frame {number}: {error.reason}") from error

    return _cut_all(decoded(), len(files), processor, fps)


def _cut_all(frames: Iterator["np.ndarray"], count: int, processor: VideoProcessor, fps: float) -> VideoPatches:
    values, grid = _cut(frames, count, processor)
    return VideoPatches(values, grid, processor.timestamps(range(count), fps), processor.temporal_patch_size / fps)


def _cut(
    frames: Iterator["np.ndarray"], count: int, processor: VideoProcessor, *, most: int | None = None
) -> tuple["np.ndarray", tuple[int, int, int]]:
    """Patches of `count` frames. Fewer than that, or no whole number of temporal steps, are filled up with the last one.

    Raises MediaError for more than `most` patches: what the container says of the size is another one than the frames have.
    """
    step = processor.temporal_patch_size
    first = next(frames, None)
    if first is None:
        raise MediaError("it is damaged or incomplete: none of its frames can be decoded")
    grid = processor.grid(count, *first.shape[:2])
    if most is not None and math.prod(grid) > most:
        raise MediaError("it is damaged: its frames have another size than its header says")
    height, width = grid[1] * processor.patch_size, grid[2] * processor.patch_size
    room = processor.empty(grid)
    processor.cut(first, height, width, room[0], 0)
    at = 0
    for at, frame in enumerate(frames, 1):
        if frame.shape != first.shape:
            raise MediaError("it has frames of different sizes")
        processor.cut(frame, height, width, room[at // step], at % step)
    processor.repeat(room[at // step], at % step, at % step + 1)
    if at // step + 1 < grid[0]:
        last = room[at // step].copy()
        processor.repeat(last, step - 1, 0)
        room[at // step + 1 :] = last
    return room.reshape(-1, processor.patch_dim), grid


def _format(data: bytes) -> Literal["gif", "mp4", "webm"]:
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data[4:8] == b"ftyp":
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in data[:64]:
        return "webm"
    raise MediaError(f"it is in no supported format; supported are {SUPPORTED}")


def _gif_frames(data: bytes, indexes: Sequence[int], limits: VideoLimits, check: Callable[[], None]) -> Iterator["np.ndarray"]:
    from PIL import Image

    with refusing_damage(), Image.open(io.BytesIO(data), formats=["GIF"]) as image:
        at = 0
        for wanted in indexes:
            check()
            while at < wanted:  # one by one: each is decoded, and a seek over many could not be stopped
                at += 1
                check()
                image.seek(at)
            check_pixels(*image.size, max_pixels=limits.frame_pixels)
            image.load()
            yield to_rgb(image)


def _open(data: bytes, limits: VideoLimits) -> "InputContainer":
    try:
        import av
    except ImportError:
        raise MediaError("it is an MP4 or WebM file, which this server cannot read: it lacks PyAV (the extra 'vlm')") from None
    # With a level set, PyAV's log callback takes the GIL, while freeing a decoder holds it and waits for the decoder's threads:
    # one word about a damaged frame, and the process stands still.
    av.logging.set_level(None)
    demuxer = _DEMUXERS[_format(data)]
    with refusing_damage():
        container = av.open(
            io.BytesIO(data),
            format=demuxer,
            options={
                "format_whitelist": demuxer,
                "codec_whitelist": ",".join(_DECODERS),
                "protocol_whitelist": "none",
                "max_pixels": str(limits.frame_pixels),
            },
            io_open=_open_nothing,
        )
    return container


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("a container names another file")


def _probe(
    container: "InputContainer", kind: Literal["mp4", "webm"], limits: VideoLimits, check: Callable[[], None]
) -> VideoInfo:
    """Counts packets: what a header says of the number of frames may be missing, or a lie."""
    if not container.streams.video:
        raise MediaError("it has no video in it")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None or codec.codec.canonical_name not in _CODECS:
        raise MediaError(f"it is of a codec that is not supported; supported are {', '.join(_CODECS)}")
    frames = 0
    for packet in container.demux(stream):
        check()
        frames += packet.size > 0
        if frames > limits.frames:
            raise MediaError(f"it has more than {limits.frames} frames")
    rate = stream.average_rate or stream.guessed_rate
    if not frames or not rate:
        raise MediaError("it is damaged or incomplete and cannot be decoded")
    return VideoInfo(kind, codec.width, codec.height, frames, float(rate))


def _av_frames(data: bytes, indexes: Sequence[int], limits: VideoLimits, check: Callable[[], None]) -> Iterator["np.ndarray"]:
    import numpy as np

    wanted = set(indexes)
    with _open(data, limits) as container, refusing_damage():
        codec = container.streams.video[0].codec_context
        codec.options = {"max_pixels": str(limits.frame_pixels)}
        codec.thread_count, codec.thread_type = _THREADS, "AUTO"
        for at, frame in enumerate(container.decode(video=0)):
            check()
            if at in wanted:
                check_pixels(frame.width, frame.height, max_pixels=limits.frame_pixels)
                rgb = frame.to_ndarray(format="rgb24")
                yield np.rot90(rgb, round(frame.rotation / 90))
            if at >= indexes[-1]:
                break
