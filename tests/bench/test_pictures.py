"""Pictures in requests: distinct, repeatable, and asked for by `bench.vlm`."""

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from dashinfer.bench.cli import make_parser
from dashinfer.bench.measure import Run, measure_round, prepare
from dashinfer.bench.pictures import QUESTION, draw, make_question, red_circle
from dashinfer.bench.settings import Settings
from tests.bench.test_client import DONE, STOP, TARGET, event, server, streaming, text, usage

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parents[2]
SIZES = ((40, 30), (64, 48))


def shown(body: dict[str, Any]) -> bytes:
    """The picture's file in a request."""
    (message,) = body["messages"]
    picture, question = message["content"]
    assert (picture["type"], question) == ("image_url", {"type": "text", "text": QUESTION})
    return base64.b64decode(picture["image_url"]["url"].partition(",")[2])


def test_the_same_seed_draws_the_same_picture_and_no_other_does() -> None:
    pictures = [draw(str(seed), (60, 40)) for seed in range(50)]

    assert draw("7", (60, 40)) == pictures[7]
    assert len({picture.tobytes() for picture in pictures}) == 50
    assert {(picture.mode, picture.size) for picture in pictures} == {("RGB", (60, 40))}


@pytest.mark.parametrize(("image_format", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_a_question_holds_the_picture_as_a_file(image_format: Any, magic: bytes) -> None:
    body = {"messages": [{"content": make_question(red_circle(), image_format)}]}

    assert shown(body).startswith(magic)
    red, green, _ = Image.open(io.BytesIO(shown(body))).convert("RGB").getpixel((84, 84))
    assert (red > 240, green < 15) == (True, True)


async def test_every_request_shows_a_picture_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[dict[str, Any]] = []
    parts = [(1.0, event(text("a"))), (2.0, event(text("b")) + STOP), (2.0, usage(50, 2) + DONE)]
    run = Run(TARGET, connect=server(lambda body: streaming(*parts), seen))
    settings = Settings(concurrency=(2,), output_tokens=2, images=SIZES, image_format="png")

    await prepare(run, settings)
    asked = len(seen)
    figures = await measure_round(run, 2, 0, settings)

    files = [shown(body) for body in seen]
    assert (run.answer, run.words) == ("ab", 0)
    assert files[0] == shown({"messages": [{"content": make_question(red_circle(), "png")}]})
    assert [Image.open(io.BytesIO(file)).size for file in files[asked:]] == [*SIZES, *SIZES]
    assert len(set(files[2:])) == len(files) - 2  # the first question is asked twice
    assert (figures.requests, figures.errors) == (4, 0)
    assert figures.requests_per_second == pytest.approx(4 / 4.0)


def test_sizes_are_read_from_the_command_line() -> None:
    assert make_parser().parse_args(["--images", "224x224,640x480"]).images == ((224, 224), (640, 480))


@pytest.mark.parametrize("sizes", ["224", "0x5", "1x2x3", "axb"])
def test_the_command_refuses_what_is_no_size(sizes: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.vlm", "--url", "http://127.0.0.1:9/v1", "--images", sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 2
    assert "bench.vlm: error: argument --images: " in result.stderr


def test_the_command_asks_about_pictures_by_itself() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.vlm", "--url", "http://127.0.0.1:9/v1", "--model", "m"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "bench.vlm: error: server does not answer: ConnectError" in result.stderr
