import io
import struct
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dashinfer.errors import MediaError, UnsupportedModel
from dashinfer.vision.container import is_complete
from dashinfer.vision.preprocess import Patches
from dashinfer.vision.sampling import VideoProcessor
from dashinfer.vision.video import VideoLimits, cut_frames, decode_video, probe_video

from .oracle import oracle, video_module
from .pictures import Image, encode, picture

pytestmark = pytest.mark.feature("Vision", "Videos")

QWEN2 = VideoProcessor.from_hf({}, model_type="qwen2_5_vl")
QWEN3 = VideoProcessor.from_hf(
    {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"}, model_type=""
)
PROCESSORS = {"qwen2_vl": QWEN2, "qwen3_vl": QWEN3}
FILES = [("mp4", "libx264"), ("mp4", "mpeg4"), ("mp4", "libx265"), ("webm", "libvpx"), ("webm", "libvpx-vp9")]


def oracle_class(family: str) -> Any:
    return getattr(video_module(family), {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[family])


def counting(frames: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Pictures whose left half is as bright as their number times 7, with a white corner at the top left."""
    found = []
    for number in range(frames):
        rgb = picture(height, width)
        rgb[:, : width // 2] = number * 7
        rgb[: height // 4, : width // 4] = 255
        found.append(rgb)
    return found


def movie(frames: list[np.ndarray], format: str = "mp4", codec: str = "libx264", rate: int = 10) -> bytes:
    av = pytest.importorskip("av", reason="PyAV is of the extra vlm")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.bit_rate = 4_000_000
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for rgb in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def animation(frames: list[np.ndarray], **options: object) -> bytes:
    first, *rest = map(Image.fromarray, frames)
    return encode(first, "GIF", save_all=True, append_images=rest, **options)


def brightness(patches: Patches, processor: VideoProcessor) -> list[int]:
    """Of the bottom left corner of every frame: the number of `counting`'s picture."""
    t, h, w = patches.grid
    side = processor.merge_size
    corner = patches.values.reshape(t, h // side, w // side, side * side, -1)[:, -1, 0, 2]
    return [round(value / 7) for value in corner.reshape(t, 3, 2, -1).mean((1, 3)).flatten()]


@pytest.mark.parametrize("family", PROCESSORS)
def test_frames_are_those_that_the_video_processor_samples(family: str) -> None:
    """Against its own `sample_frames`, but for what it cannot do: see the module `sampling`."""
    processor = PROCESSORS[family]
    settings = SimpleNamespace(num_frames=None, fps=2.0, temporal_patch_size=2, min_frames=4, max_frames=768)
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(300):
        total, rate = int(np.exp(rng.uniform(0.7, 9.5))), float(rng.choice([24, 25, 30, 23.976, 29.97, 60, 12.5]))
        fps = float(rng.choice([0.5, 1, 2, 4]))
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        expected = oracle_class(family).sample_frames(settings, metadata, fps=fps).tolist()
        if family == "qwen2_vl" and len(expected) % 2:
            continue  # one frame too many
        compared += 1
        assert expected == processor.sample(total, rate, fps), (total, rate, fps)

    assert compared > 250


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("capped", [False, True])
def test_sizes_follow_the_rule_of_the_model(family: str, capped: bool) -> None:
    """Against the video processor's `resize`, of which only torchvision's part is left out."""
    module = video_module(family)
    rng = np.random.default_rng(1)
    for _ in range(300):
        frames, height, width = int(rng.integers(2, 60)), int(rng.integers(8, 3000)), int(rng.integers(8, 3000))
        if max(height, width) > 150 * min(height, width):
            continue
        size = {"shortest_edge": 4096, "longest_edge": int(rng.integers(100_000, 20_000_000))}
        processor = VideoProcessor.from_hf({"size": size, "cap_pixels_per_frame": capped}, model_type=family)
        factor, most = processor.factor, size["longest_edge"]
        if family == "qwen3_vl":
            if capped:
                most = max(min(768 * factor**2, most // frames), int(4096 * 1.05)) * frames
            expected = module.smart_resize(frames, height, width, 2, factor, 4096, most)
        else:
            if capped:
                most = max(min(most, int(128000 * factor**2 * 0.9) * 2 // frames), int(4096 * 1.05))
            expected = module.smart_resize(height, width, factor, 4096, most)

        t, h, w = processor.grid(frames, height, width)

        assert (t, h * processor.patch_size, w * processor.patch_size) == ((frames + 1) // 2, *expected)


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_patches_are_those_of_the_video_processor(family: str, frames: int) -> None:
    """Against its own `patchify`, of frames that Pillow has resized; values as the image processor's."""
    torch = pytest.importorskip("torch")
    processor = PROCESSORS[family]
    pictures = counting(frames, 90, 130)

    found = cut_frames(pictures, processor)

    t, h, w = found.grid
    size = w * processor.patch_size, h * processor.patch_size
    resized = [np.asarray(Image.fromarray(rgb).resize(size, resample=3)) for rgb in pictures]
    video = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)[None]
    expected, *grid = oracle_class(family).patchify(None, video, processor.patch_size, 2, 2)
    assert (t, h, w) == tuple(grid)
    assert np.array_equal(expected[0].numpy(), found.values)


def test_a_pair_of_equal_frames_is_an_image() -> None:
    rgb = picture(120, 200)
    settings = {"min_pixels": QWEN2.min_pixels, "max_pixels": QWEN2.max_pixels}
    expected, grid = oracle(settings, [Image.fromarray(rgb)])

    found = cut_frames([rgb, rgb], QWEN2)

    assert found.grid == tuple(grid[0])
    assert np.array_equal(expected, QWEN2.pixel_values(found.values))


@pytest.mark.parametrize(("format", "codec"), FILES)
def test_a_file_is_sampled_and_cut(format: str, codec: str) -> None:
    data = movie(counting(30), format, codec)

    info = probe_video(data)
    found = decode_video(data, QWEN2)

    assert (info.format, info.width, info.height, info.frames, info.fps) == (format, 128, 96, 30, 10.0)
    assert found.grid == QWEN2.grid(6, 96, 128)
    assert brightness(found, QWEN2) == QWEN2.sample(30, 10.0) == [0, 5, 10, 15, 20, 25]
    assert found.timestamps == [0.25, 1.25, 2.25]
    assert found.seconds_per_step == 1.0


def test_a_gif_is_sampled_and_cut() -> None:
    data = animation(counting(20), duration=100)

    found = decode_video(data, QWEN3, fps=3)

    indexes = QWEN3.sample(20, 10.0, 3)
    assert probe_video(data).frames == 20
    assert probe_video(data).fps == pytest.approx(10)
    assert indexes == [0, 4, 8, 11, 15, 19]
    assert brightness(found, QWEN3) == indexes
    assert found.timestamps == pytest.approx([0.2, 0.95, 1.7])


def test_gif_frames_are_pillows() -> None:
    pictures = counting(4, 56, 56)
    data = animation(pictures)
    image = Image.open(io.BytesIO(data))
    expected = []
    for at in range(4):
        image.seek(at)
        expected.append(np.asarray(image.convert("RGB")))

    assert np.array_equal(cut_frames(expected, QWEN2).values, decode_video(data, QWEN2).values)


@pytest.mark.parametrize(("delay", "fps"), [(0, 10.0), (1, 10.0), (2, 50.0), (50, 2.0)])
def test_how_long_gif_frames_are_shown(delay: int, fps: float) -> None:
    data = animation(counting(5), duration=delay * 10)

    assert probe_video(data).fps == pytest.approx(fps)


def test_the_time_between_steps_is_that_of_the_processors() -> None:
    """Qwen3-VL's timestamps, and Qwen2.5-VL's `second_per_grid_ts`, as transformers computes them."""
    processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    metadata = pytest.importorskip("transformers.video_utils").VideoMetadata
    data = animation(counting(23), duration=40)
    info = probe_video(data)
    indexes = QWEN3.sample(info.frames, info.fps)

    found = decode_video(data, QWEN3)

    sampled = metadata(total_num_frames=23, fps=info.fps, frames_indices=indexes).sampled_fps
    assert found.timestamps == processing.Qwen3VLProcessor._calculate_timestamps(None, list(indexes), info.fps, 2)
    assert found.seconds_per_step == pytest.approx(2 / sampled)


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_a_turned_video_is_turned_upright(clockwise: int) -> None:
    """As a phone held upright records it: the display matrix in the track's header says how to show it."""
    data = bytearray(movie(counting(4)))
    matrix = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)

    found = decode_video(bytes(data), QWEN2)

    t, h, w = found.grid
    corners = [found.values.reshape(t, h // 2, w // 2, -1)[0, row, column].mean() for row in (0, -1) for column in (0, -1)]
    white = {0: 0, 90: 1, 180: 3, 270: 2}[clockwise]
    assert int(np.argmax(corners)) == white
    assert (h > w) == (clockwise in (90, 270))


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_a_single_frame_is_a_video(processor: VideoProcessor) -> None:
    found = decode_video(animation(counting(1)), processor)

    assert found.grid[0] == 1
    frames = found.values.reshape(len(found.values), 3, 2, -1)
    assert np.array_equal(frames[:, :, 0], frames[:, :, 1])


def test_frames_are_bounded() -> None:
    processor = VideoProcessor.from_hf({}, model_type="qwen2_vl", max_frames=6)
    long = VideoProcessor.from_hf({"max_frames": 4}, model_type="qwen3_vl", max_frames=6)

    assert len(processor.sample(30_000, 30.0, 30.0)) == 6
    assert len(long.sample(30_000, 30.0, 30.0)) == 4
    assert VideoProcessor.from_hf({}, model_type="qwen3_vl", max_frames=2).min_frames == 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(frames=19), "more than 19 frames"),
        (VideoLimits(frame_pixels=96 * 128 - 1), "it has 128 x 96 pixels, more than 12287 in all"),
        (VideoLimits(pixels=20 * 96 * 128 - 1), "20 frames of 128 x 96 pixels, more than 245759 pixels in all"),
    ],
)
@pytest.mark.parametrize("kind", ["gif", "mp4", "webm"])
def test_limits_are_checked_before_decoding(kind: str, limits: VideoLimits, message: str) -> None:
    frames = counting(20)
    data = animation(frames) if kind == "gif" else movie(frames, kind, {"mp4": "libx264", "webm": "libvpx"}[kind])

    with pytest.raises(MediaError, match=message):
        probe_video(data, limits)


def test_a_gif_frame_beyond_the_screen_counts() -> None:
    data = bytearray(animation(counting(3), duration=100))
    separator = data.rindex(b"\x21\xf9\x04") + 8  # after the graphic control of the last picture
    assert data[separator] == 0x2C
    struct.pack_into("<HH", data, separator + 5, 60_000, 60_000)

    with pytest.raises(MediaError, match="60000 x 60000 pixels"):
        probe_video(bytes(data))


def test_frames_of_another_size_than_planned_are_refused() -> None:
    """Tokens were counted, and memory was taken, by what the file says before it is decoded."""
    processor = VideoProcessor(min_pixels=28 * 28, max_pixels=20 * 28 * 28)
    data = bytearray(animation(counting(8, 200, 200), duration=100))
    separator = data.rindex(b"\x21\xf9\x04") + 8  # of the last picture, which is not among the sampled ones
    assert data[separator] == 0x2C
    struct.pack_into("<H", data, separator + 5, 2000)

    info = probe_video(bytes(data))
    assert processor.grid(4, info.height, info.width) == (2, 2, 28)
    with pytest.raises(MediaError, match="another size than its header says"):
        decode_video(bytes(data), processor)


def test_a_video_without_pixels_is_refused() -> None:
    data = bytearray(movie(counting(6, 64, 64)))
    sizes = data.index(b"avc1", data.index(b"moov")) + 28
    assert struct.unpack_from(">HH", data, sizes) == (64, 64)
    struct.pack_into(">HH", data, sizes, 0, 0)
    parameters, frames = data.index(b"avcC") + 10, data.index(b"mdat") + 8
    data[parameters : parameters + 20] = bytes(20)
    end = data.index(b"moov") - 4
    data[frames:end] = b"\xff" * (end - frames)

    with pytest.raises(MediaError, match="gives it no pixels"):
        probe_video(bytes(data))


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_an_incomplete_file_is_refused(format: str, codec: str) -> None:
    data = movie(counting(10), format, codec)

    for end in range(0, len(data), len(data) // 40):
        assert not is_complete(data[:end]) or end == 0
        with pytest.raises(MediaError, match=r"incomplete|no supported format"):
            decode_video(data[:end], QWEN2)


@pytest.mark.parametrize("kind", ["gif", "mp4", "webm"])
@pytest.mark.filterwarnings("ignore")
def test_damage_is_a_refusal_and_nothing_else(kind: str) -> None:
    frames = counting(6, 32, 32)
    whole = animation(frames) if kind == "gif" else movie(frames, kind, {"mp4": "libx264", "webm": "libvpx"}[kind])
    rng = np.random.default_rng(0)
    limits = VideoLimits(frame_pixels=1 << 20, frames=1000)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(256)
        try:
            decode_video(bytes(data), QWEN2, limits)
        except MediaError:
            continue


def test_pyav_never_logs_through_python() -> None:
    """Its callback wants the GIL, which freeing a decoder holds until the decoder's threads have had their say."""
    av = pytest.importorskip("av", reason="PyAV is of the extra vlm")
    data = movie(counting(2))
    av.logging.set_level(av.logging.ERROR)

    decode_video(data, QWEN2)

    assert av.logging.get_level() is None


def test_other_codecs_are_refused() -> None:
    data = movie(counting(3), "mp4", "mjpeg")

    with pytest.raises(MediaError, match="a codec that is not supported"):
        probe_video(data)


@pytest.mark.parametrize(
    "data",
    [b"", b"#EXTM3U\nhttp://127.0.0.1/secret\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"RIFF\0\0\0\0AVI LIST"],
)
def test_other_containers_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="no supported format; supported are MP4, WebM and GIF"):
        probe_video(data)


def test_a_server_without_pyav_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(MediaError, match="lacks PyAV"):
        probe_video(struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0))


def test_lists_of_frames_must_fit_together() -> None:
    with pytest.raises(MediaError, match="frames of different sizes"):
        cut_frames([picture(30, 40), picture(40, 30)], QWEN2)
    with pytest.raises(MediaError, match="no frames"):
        cut_frames([], QWEN2)
    with pytest.raises(MediaError, match="200 times"):
        cut_frames([picture(1, 300)], QWEN2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"video_processor_type": "LlavaVideoProcessor"}, "'LlavaVideoProcessor' are not supported"),
        ({"fps": 0}, "fps is 0"),
        ({"min_frames": "4"}, "min_frames is '4'"),
        ({"do_resize": False}, r"video_preprocessor_config\.json: do_resize false"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        VideoProcessor.from_hf(config, model_type="qwen2_vl")


def test_the_rule_is_the_files_or_the_models() -> None:
    assert VideoProcessor.from_hf({}, model_type="qwen3_vl_moe").rule == "qwen3"
    assert VideoProcessor.from_hf({}, model_type="qwen2_5_vl").rule == "qwen2"
    assert QWEN3.rule == "qwen3" and QWEN3.patch_size == 16


def test_a_gif_can_be_given_up_at_every_frame() -> None:
    """Also at those that are decoded and not shown."""
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1

    data = animation(counting(20), duration=1000)
    processor = QWEN3.limited(4)
    found = decode_video(data, processor, check=check)

    assert brightness(found, processor) == processor.sample(20, 1.0, None)
    assert len(brightness(found, processor)) == 4
    assert asked >= 20
