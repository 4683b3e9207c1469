"""A request's media on their way: all at once, in order, cancelled together, and paid for."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from dashinfer.errors import ContextLengthExceeded, InvalidRequest, MediaError
from dashinfer.models.vision_config import VisionConfig
from dashinfer.vision import intake as intakes
from dashinfer.vision.intake import Intake, Seen
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.preprocess import ImageProcessor
from dashinfer.vision.request import MediumRequest
from dashinfer.vision.sampling import VideoProcessor

from .fake_internet import FakeInternet, Server, says, says_forever
from .pictures import Image, encode, picture, rotated

HEAD = b"HTTP/1.0 200 OK\r\n\r\n"
FILES = [encode(Image.fromarray(picture(56 * (number + 1), 84, number)), "PNG") for number in range(3)]


@pytest.fixture
async def internet(internet: FakeInternet) -> FakeInternet:
    """With a server for each of FILES."""
    for number, content in enumerate(FILES):
        internet.add(f"{number}.example", says(HEAD, content), address=f"8.8.8.{number}")
    return internet


def vision(architecture: str = "Qwen2VLForConditionalGeneration") -> Any:
    config = VisionConfig.from_hf({"architectures": [architecture], "vision_config": {"hidden_size": 1280}})
    return SimpleNamespace(config=config, image=ImageProcessor(), video=VideoProcessor())


def intake(internet: FakeInternet, **options: Any) -> Intake:
    return Intake(options.pop("model", vision()), MediaPolicy(timeout=5), max_waiting=9, network=internet, **options)


def images(*sources: str, **fields: Any) -> list[MediumRequest]:
    return [MediumRequest("image", (source,), param=f"at {number}", **fields) for number, source in enumerate(sources)]


async def take(intake: Intake, requests: list[MediumRequest], max_tokens: int = 10_000) -> list[Seen]:
    """What comes out; what the account held is given back then."""
    with intake.budget.open() as account:
        seen = await intake.take(requests, account, max_tokens=max_tokens)
        assert account.held == sum(len(patches) for patches in {each.medium.key: each.medium.patches for each in seen}.values())
    assert intake.budget.used == 0
    return seen


async def test_order_is_the_requests(internet: FakeInternet) -> None:
    urls = [f"http://{number}.example/" for number in (2, 0, 1, 0)]

    seen = await take(intake(internet), images(*urls))

    assert [each.medium.grid for each in seen] == [(1, 12, 6), (1, 4, 6), (1, 8, 6), (1, 4, 6)]
    assert [each.medium.tokens for each in seen] == [18, 6, 12, 6]
    assert seen[1].medium == seen[3].medium
    assert len({each.medium.key for each in seen}) == 3
    assert await take(intake(internet), []) == []


async def test_a_key_stands_for_the_content(internet: FakeInternet) -> None:
    """Files that show the same have one key; another kind, and with Qwen2.5-VL another time between frames, has another."""
    upright = Image.fromarray(picture(56, 84))
    files = [encode(upright, "PNG"), encode(upright, "BMP"), encode(upright.rotate(90, expand=True), "PNG", exif=rotated(6))]
    for number, content in enumerate(files):
        internet.add(f"{number}.example", says(HEAD, content), address=f"8.8.8.{number}")
    urls = tuple(f"http://{number}.example/" for number in range(3))
    videos = [MediumRequest("video", urls[:1] * 2, frames=True, fps=fps) for fps in (1.0, 2.0)]

    first, second, third, slow, quick = await take(intake(internet), [*images(*urls), *videos])
    _, _, _, slow_timed, quick_timed = await take(
        intake(internet, model=vision("Qwen2_5_VLForConditionalGeneration")), [*images(*urls), *videos]
    )

    assert first.medium == second.medium == third.medium
    assert slow.medium.patches == slow_timed.medium.patches
    assert slow.medium.key == quick.medium.key != first.medium.key
    assert slow_timed.medium.key != quick_timed.medium.key
    assert (slow.seconds_per_step, quick.seconds_per_step) == (2.0, 1.0)


async def test_the_first_failure_cancels_the_rest(internet: FakeInternet, autojump_clock: MockClock) -> None:
    internet.add("slow.example", says_forever(HEAD, b"x", pause=1))
    internet.add("broken.example", says(b"HTTP/1.0 500 x\r\n\r\n"), address="8.8.4.4")
    start = trio.current_time()

    with pytest.raises(MediaError, match=re.escape("media[1]: its host answered with status 500")) as caught:
        await take(intake(internet), images("http://slow.example/", "http://broken.example/", "http://slow.example/2"))

    assert (caught.value.index, caught.value.param) == (1, "at 1")
    assert trio.current_time() == start


async def test_cancellation_closes_connections(internet: FakeInternet, autojump_clock: MockClock) -> None:
    internet.add("example.com", says_forever(HEAD, b"x", pause=1))
    taking = intake(internet)

    with trio.move_on_after(3) as scope:
        await take(taking, images(*(f"http://example.com/{number}" for number in range(3))))

    assert scope.cancelled_caught
    assert len(internet.record) == 6
    assert (internet.open_lines, taking.budget.used) == (set(), 0)


async def test_so_many_are_fetched_at_the_same_time(internet: FakeInternet) -> None:
    """Eight of a request."""
    waiting = 0
    most = 0
    go = trio.Event()

    def serve(content: bytes) -> Server:
        async def wait(stream: trio.abc.Stream) -> None:
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            if waiting == 8:
                go.set()
            await go.wait()
            waiting -= 1
            await says(HEAD, content)(stream)

        return wait

    internet.add("example.com", serve(FILES[0]))
    await take(intake(internet), images(*["http://example.com/"] * 12))

    assert most == 8


async def test_tokens_are_counted_before_anything_is_decoded(internet: FakeInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intakes, "decode_picture", None)
    requests = images("http://2.example/")

    with pytest.raises(ContextLengthExceeded, match="is 18 tokens, and the images and videos become 18 or more"):
        await take(intake(internet), requests, max_tokens=18)


async def test_pixels_are_counted(internet: FakeInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intakes, "MAX_TOTAL_PIXELS", 5000)

    with pytest.raises(MediaError, match="more than 5000 pixels together"):
        await take(intake(internet), images("http://0.example/", "http://1.example/"))


async def test_what_no_frame_can_bring_to_a_rank_is_refused(internet: FakeInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intakes, "MAX_MEDIUM_BYTES", 12 * 6 * 1176 - 1)

    with pytest.raises(MediaError, match="it becomes 84672 bytes of patches"):
        await take(intake(internet), images("http://2.example/"))


async def test_bounds_of_the_request(internet: FakeInternet) -> None:
    with pytest.raises(InvalidRequest, match="max_pixels 100 must be") as caught:
        await take(intake(internet), images("http://0.example/", max_pixels=100))

    assert caught.value.param == "at 0"
    assert internet.record == []


async def test_a_small_budget_is_enough_for_one_at_a_time(internet: FakeInternet) -> None:
    """Requests that need more than the whole budget get done, one after the other."""
    taking = intake(internet, memory=1000)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(take_alone, taking, images(*(f"http://{number}.example/" for number in range(3))))

    assert taking.budget.used == 0


async def take_alone(intake: Intake, requests: list[MediumRequest]) -> None:
    with intake.budget.open() as account:
        assert len(await intake.take(requests, account, max_tokens=10_000)) == 3


async def test_a_cancelled_request_ends_its_decoding(internet: FakeInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is not left behind with memory that nobody counts."""
    cutting, go = trio.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()
    ended = []

    def decode(content: bytes) -> Any:
        token.run_sync_soon(cutting.set)
        trio.from_thread.run(go.wait)
        ended.append(True)

    monkeypatch.setattr(intakes, "decode_picture", decode)
    taking = intake(internet)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                await take(taking, images("http://0.example/"))

        async def cancel(scope: trio.CancelScope) -> None:
            await cutting.wait()
            scope.cancel()
            assert taking.budget.used > 0
            go.set()

        nursery.start_soon(run)

    assert taking.budget.used == 0
