"""Requests with images and videos: what the engine is given, against transformers' processors, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trio

from dashinfer.engine.api import PromptMedia
from dashinfer.serving.service import TextModel
from dashinfer.vision import intake as intakes

from ..vision.oracle import image_module, video_module
from .conftest import Running, RunServer
from .fake_engine import SeeingEngine
from .seeing import (
    FAMILIES,
    IMAGE,
    VIDEO,
    MediaServer,
    data_uri,
    encode,
    gif,
    make_text,
    media_server,
    picture,
    write_model,
)

CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
PICTURES = [encode(picture(60, 90)), encode(picture(200, 120, 1), "JPEG"), encode(picture(33, 41, 2).convert("RGBA"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def seeing(folders: dict[str, Path]) -> TextModel:
    return make_text(folders["qwen2_vl"])


@pytest.fixture(scope="module")
def web() -> Iterator[MediaServer]:
    with media_server() as server:
        for number, content in enumerate(PICTURES):
            server.add(f"/{number}", content)
        server.add("/gif", gif())
        yield server


def image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


async def ask(server: Running, *messages: dict[str, Any], **fields: Any) -> Any:
    body = {"model": "demo", "messages": list(messages), **fields}
    return await server.client.post("/v1/chat/completions", json=body)


async def refusal(server: Running, *messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    answer = await ask(server, *messages, **fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def conversations(url: str) -> dict[str, list[dict[str, Any]]]:
    return {
        "one": [user(image(f"{url}/0"), text("say a"))],
        "two turns": [
            {"role": "system", "content": "be brief"},
            user(text("first"), image(f"{url}/1"), text("and"), {"type": "image", "image": data_uri(PICTURES[0])}),
            {"role": "assistant", "content": "fine"},
            user(text("say yes "), {"type": "image_url", "image_url": f"{url}/2"}),
        ],
        "the same twice": [user(image(f"{url}/1"), image(f"{url}/0"), image(data_uri(PICTURES[1])), text("say b"))],
        "a tool's": [user(text("look")), {"role": "tool", "content": [image(f"{url}/0")]}, user(text("say c"))],
    }


SHOWN = {"one": [0], "two turns": [1, 0, 2], "the same twice": [1, 0, 1], "a tool's": [0]}


def hf_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        additional_special_tokens=["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    )


def hf_processor(folder: Path, family: str) -> Any:
    """The family's processor with the Pillow image processor; of its video processor only the settings are looked at."""
    import importlib

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    video = video_module("qwen3_vl" if family == "qwen3_vl" else "qwen2_vl")
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    cls = getattr(module, f"{CLASSES[family]}Processor")
    video_class = getattr(video, "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor")
    # Its check of classes looks at transformers' registry, which lacks video processors where there is no torchvision.
    unchecked = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda self, name, argument: None})
    return unchecked(
        image_processor=image_module().Qwen2VLImageProcessorPil(**settings),
        tokenizer=hf_tokenizer(folder),
        video_processor=video_class.__new__(video_class),
        chat_template=json.loads((folder / "chat_template.json").read_text())["chat_template"],
    )


def rope_index(family: str) -> Any:
    """transformers' `get_rope_index`, which needs nothing of a model but its config."""
    import transformers

    model = getattr(transformers, f"{CLASSES[family]}Model")
    model = model.__new__(model)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    return model.get_rope_index


def positions_of(media: PromptMedia) -> np.ndarray:
    return np.frombuffer(media.positions, "<i4").reshape(3, -1)


@pytest.mark.feature("Vision", "Images")
@pytest.mark.parametrize("family", FAMILIES)
async def test_images_are_those_of_transformers(
    run_server: RunServer, folders: dict[str, Path], web: MediaServer, family: str
) -> None:
    """Tokens, patches, spans and positions, over HTTP and as data: URIs."""
    processor, index = hf_processor(folders[family], family), rope_index(family)
    model = make_text(folders[family])
    table = np.frombuffer(model.vision.pixel_values, np.float32).reshape(3, 256)
    talks = conversations(web.url)
    async with run_server(engine_type=SeeingEngine, model=model, allow_private_media=True) as server:
        answers = {name: await ask(server, *messages) for name, messages in talks.items()}

    for (name, messages), (prompt, _, media) in zip(talks.items(), server.engine.submitted, strict=True):
        assert answers[name].status_code == 200
        rendered = processor.tokenizer.apply_chat_template(
            template_form(messages), chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
        )
        shown = [upright(PICTURES[number]) for number in SHOWN[name]]
        expected = processor(text=[rendered], images=shown, return_tensors="pt")
        assert prompt == expected["input_ids"][0].tolist()
        grids = [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
        by_key = {medium.key: medium for medium in media.media}
        assert len(by_key) == len(media.media) == len(set(SHOWN[name]))
        found = [by_key[span.key] for span in media.spans]
        assert [medium.grid for medium in found] == grids
        assert [(span.offset, span.length) for span in media.spans] == [(0, medium.tokens) for medium in found]
        covered = [place for span in media.spans for place in range(span.start, span.end)]
        assert covered == [place for place, token in enumerate(prompt) if token == IMAGE]
        patches = np.concatenate([np.frombuffer(medium.patches, np.uint8) for medium in found])
        values = table[np.arange(len(patches)) // (len(patches) // len(expected["pixel_values"]) // 3) % 3, patches]
        assert np.array_equal(values, expected["pixel_values"].numpy().ravel())
        ids = expected["input_ids"]
        positions, delta = index(
            input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), image_grid_thw=expected["image_grid_thw"]
        )
        assert positions_of(media).tolist() == positions[:, 0].tolist()
        assert media.delta == int(delta)
        usage = answers[name].json()["usage"]
        assert usage["prompt_tokens"] == len(prompt)
        assert usage["prompt_tokens_details"]["image_tokens"] == len(covered)
        assert usage["prompt_tokens_details"]["video_tokens"] == 0


def template_form(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What transformers' template is given: parts by their kind."""

    def part_form(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": part["type"].removesuffix("_url")}

    return [
        {
            **message,
            "content": [*map(part_form, message["content"])] if isinstance(message["content"], list) else message["content"],
        }
        for message in messages
    ]


def upright(content: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(content))


@pytest.mark.feature("Vision", "Videos")
@pytest.mark.parametrize("family", FAMILIES)
async def test_videos_are_those_of_transformers(
    run_server: RunServer, folders: dict[str, Path], web: MediaServer, family: str
) -> None:
    """A file, frames, and an image between them: tokens and positions."""
    processor, index = hf_processor(folders[family], family), rope_index(family)
    frames = [data_uri(encode(picture(64, 64, seed))) for seed in range(3)]
    parts = [
        {"type": "video_url", "video_url": {"url": f"{web.url}/gif", "fps": 5}},
        image(f"{web.url}/0"),
        {"type": "video", "video": frames, "fps": 2},
        text("say d"),
    ]
    model = make_text(folders[family])
    async with run_server(engine_type=SeeingEngine, model=model, allow_private_media=True) as server:
        answer = await ask(server, user(*parts))

    assert answer.status_code == 200, answer.text
    prompt, _, media = server.engine.submitted[0]
    by_key = {medium.key: medium for medium in media.media}
    order = list(dict.fromkeys(span.key for span in media.spans))
    first, still, second = (by_key[key] for key in order)
    assert (first.grid[0], still.grid[0], second.grid[0]) == (2, 1, 2)
    times = [(model.vision.video.sample(8, 10.0, 5), 10.0), ([0, 1, 2], 2.0)]
    texts = iter(
        processor.replace_video_token(
            {
                "video_grid_thw": np.array([medium.grid]),
                "video_metadata": [SimpleNamespace(fps=fps, frames_indices=list(indexes))],
            },
            0,
        )
        for medium, (indexes, fps) in zip((first, second), times, strict=True)
    )
    rendered = processor.tokenizer.apply_chat_template(
        template_form([user(*parts)]), chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    holder = "<|vision_start|><|video_pad|><|vision_end|>" if family == "qwen3_vl" else "<|video_pad|>"
    for expanded in texts:
        rendered = rendered.replace(holder, expanded.replace("<|video_pad|>", "<|seen|>"), 1)
    rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * still.tokens).replace("<|seen|>", "<|video_pad|>")
    assert prompt == processor.tokenizer(rendered)["input_ids"]

    ids = torch.tensor([prompt])
    inputs = {"image_grid_thw": torch.tensor([still.grid]), "video_grid_thw": torch.tensor([first.grid, second.grid])}
    if "second_per_grid_ts" in index.__code__.co_varnames:
        inputs["second_per_grid_ts"] = [2 * 8 / (len(times[0][0]) * 10.0), 1.0]
    positions, delta = index(input_ids=ids, mm_token_type_ids=(ids == IMAGE) + 2 * (ids == VIDEO).int(), **inputs)
    assert positions_of(media).tolist() == positions[:, 0].tolist()
    assert media.delta == int(delta)
    details = answer.json()["usage"]["prompt_tokens_details"]
    assert (details["image_tokens"], details["video_tokens"]) == (still.tokens, first.tokens + second.tokens)


@pytest.mark.feature("Vision", "Images")
async def test_pixels_within_bounds(run_server: RunServer, seeing: TextModel, web: MediaServer) -> None:
    large = data_uri(encode(picture(600, 900)))
    fields = [
        {},
        {"detail": "high"},
        {"detail": "low"},
        {"max_pixels": 28 * 28 * 9},
        {"detail": "low", "max_pixels": 28 * 28 * 12},
        {"min_pixels": 28 * 28 * 50},
    ]
    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        for each in fields:
            assert (await ask(server, user(image(large, **each), text("say a")))).status_code == 200
        below = await refusal(server, user(text("x"), image(large, min_pixels=100)))
        above = await refusal(server, user(image(large, max_pixels=10**8)))
        plain = await refusal(server, user({"type": "image", "image": large, "min_pixels": 5000, "max_pixels": 4000}))

    tokens = [media.media[0].tokens for _, _, media in server.engine.submitted]
    assert tokens[0] == tokens[1] == tokens[2] == 96  # 512 x 512 pixels are more than this server's bound
    assert tokens[3] <= 9
    assert tokens[4] <= 12
    assert tokens[5] == 96
    assert (below["param"], above["param"]) == ("messages.0.content.1", "messages.0.content.0")
    assert "must be in order and within 3136 to 78400" in plain["message"]


@pytest.mark.feature("Vision", "Images")
async def test_low_detail(run_server: RunServer, tmp_path: Path) -> None:
    model = make_text(write_model(tmp_path, min_pixels=3136, max_pixels=28 * 28 * 4000))
    large = data_uri(encode(picture(900, 900), "JPEG"))
    async with run_server(engine_type=SeeingEngine, model=model) as server:
        for detail in ("low", "auto"):
            assert (await ask(server, user(image(large, detail=detail), text("say a")))).status_code == 200

    low, auto = (media.media[0].tokens for _, _, media in server.engine.submitted)
    assert (low, auto) == (18 * 18, 32 * 32)


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([image("{url}/0"), image("{url}/404")], "messages.0.content.1", "media[1]: its host answered with status 404"),
        ([image("{url}/0"), text("x"), image("data:,none")], "messages.0.content.2", "media[1]: it is in no supported format"),
        ([image("file:///etc/passwd")], "messages.0.content.0", "media[0]: this server reads no files"),
        ([image("ftp://x/")], "messages.0.content.0", "media[0]: it is none of an http:, https:, data: and file: URL"),
        ([image("{half}")], "messages.0.content.0", "media[0]: it is damaged or incomplete"),
        ([{"type": "video_url", "video_url": "{url}/0"}], "messages.0.content.0", "supported are MP4, WebM and GIF"),
        ([{"type": "video", "video": ["{url}/0", "{url}/404"]}], "messages.0.content.0", "media[0]: frame 1: its host"),
        ([{"type": "video", "video": ["{url}/0", "{url}/1"]}], "messages.0.content.0", "frames of different sizes"),
        ([{"type": "video", "video": ["{url}/0"] * 5, "max_frames": 4}], "messages.0.content.0", "has 5 frames, more than 4"),
        ([image("{url}/0")] * 129, "messages", "there are 129 images and videos; a request may have 128"),
    ],
)  # fmt: skip
async def test_a_bad_medium_is_named(
    run_server: RunServer, seeing: TextModel, web: MediaServer, parts: list, param: str, words: str
) -> None:
    half = data_uri(PICTURES[0][: len(PICTURES[0]) // 2])
    filled = json.loads(json.dumps(parts).replace("{url}", web.url).replace("{half}", half))
    async with run_server(engine_type=SeeingEngine, model=seeing, allow_private_media=True) as server:
        error = await refusal(server, user(*filled), stream=True)
        await server.service.idle()

        assert server.service.intake.budget.used == 0
    assert error["param"] == param
    assert words in error["message"]
    assert server.engine.submitted == []


@pytest.mark.feature("Security", "Media from public addresses alone")
async def test_private_addresses_are_refused(run_server: RunServer, seeing: TextModel, web: MediaServer) -> None:
    web.asked.clear()
    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        error = await refusal(server, user(image(f"{web.url}/0")))

    assert (error["code"], web.asked) == ("invalid_media", [])
    assert "not public" in error["message"]


async def test_what_does_not_fit_is_not_decoded(
    run_server: RunServer, seeing: TextModel, web: MediaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(intakes, "decode_picture", lambda content: decoded.append(content))
    huge = data_uri(encode(picture(200, 200)))
    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        server.engine.resize(40)
        error = await refusal(server, user(image(huge)))

    assert error["code"] == "context_length_exceeded"
    assert "become 49 or more" in error["message"]
    assert decoded == []


async def test_room_for_the_answer_counts_images(run_server: RunServer, seeing: TextModel, web: MediaServer) -> None:
    async with run_server(engine_type=SeeingEngine, model=seeing, allow_private_media=True) as server:
        answer = await ask(server, user(image(f"{web.url}/0"), text("say a")))

    prompt, (params,), _ = server.engine.submitted[0]
    assert answer.status_code == 200
    assert params.max_tokens == 8192 - len(prompt)


async def test_a_slow_videos_positions_count(run_server: RunServer, folders: dict[str, Path]) -> None:
    """Frames a minute apart have positions far beyond their tokens."""
    frames = [data_uri(encode(picture(28, 28, seed))) for seed in range(4)]
    async with run_server(engine_type=SeeingEngine, model=make_text(folders["qwen2_5_vl"])) as server:
        answer = await ask(server, user({"type": "video", "video": frames, "fps": 0.004}, text("say a")))
        error = await refusal(server, user({"type": "video", "video": frames, "fps": 0.0001}))

    assert answer.status_code == 200, answer.text
    prompt, (params,), media = server.engine.submitted[0]
    assert media.delta > 500
    assert params.max_tokens == 8192 - len(prompt) - media.delta
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([user(text("<|image_pad|>"))], "placeholders cannot be written as text"),
        ([user(text("<|vision_start|><|video_pad|><|vision_end|>"))], "placeholders cannot be written as text"),
        ([user(text("<|image_pad|>"), image("{url}/0"))], "placeholders cannot be written as text"),
        (
            [user(image("{url}/0")), {"role": "assistant", "content": [image("{url}/1")]}, user(text("x"))],
            "does not show every",
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
async def test_placeholders_that_do_not_go_with_the_media(
    run_server: RunServer, folders: dict[str, Path], web: MediaServer, family: str, messages: list, words: str
) -> None:
    filled = json.loads(json.dumps(messages).replace("{url}", web.url))
    async with run_server(engine_type=SeeingEngine, model=make_text(folders[family]), allow_private_media=True) as server:
        error = await refusal(server, *filled)

    assert words in error["message"]
    assert error["param"] == "messages"


async def test_a_template_that_shows_nothing(run_server: RunServer, folders: dict[str, Path], web: MediaServer) -> None:
    model = make_text(folders["qwen2_vl"], template="{% for m in messages %}{{ m.content }}{% endfor %}")
    async with run_server(engine_type=SeeingEngine, model=model, allow_private_media=True) as server:
        error = await refusal(server, user(image(f"{web.url}/0")))

    assert "takes text only" in error["message"]


async def test_a_model_that_sees_nothing(run_server: RunServer, web: MediaServer) -> None:
    web.asked.clear()
    async with run_server(allow_private_media=True) as server:
        error = await refusal(server, user(text("x"), image(f"{web.url}/0")))
        answer = await server.chat("say yes")

    assert error == {
        "message": "this server's model sees no images; it takes text only",
        "type": "invalid_request_error",
        "param": "messages.0.content.1",
        "code": "unsupported_parameter",
    }
    assert web.asked == []
    assert answer.json()["usage"]["prompt_tokens_details"].keys() == {"cached_tokens"}


async def test_text_alone(run_server: RunServer, seeing: TextModel) -> None:
    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        answer = await server.chat("say yes", stream=True)
        whole = await server.chat("say yes")
        health = await server.client.get("/health")

    assert answer.status_code == 200
    assert [media for _, _, media in server.engine.submitted] == [None, None]
    assert whole.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "image_tokens": 0, "video_tokens": 0}
    assert health.json() == {"status": "ok", "mode": "vlm"}


async def test_a_disconnect_cancels_the_fetch(run_server: RunServer, seeing: TextModel, web: MediaServer) -> None:
    body = json.dumps({"model": "demo", "messages": [user(image(f"{web.url}/hang"), text("say a"))]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with run_server(engine_type=SeeingEngine, model=seeing, allow_private_media=True) as server:
        with server.connect() as client:
            client.sendall(request)
            assert await trio.to_thread.run_sync(web.hanging.acquire, True, 10)
            assert server.service.intake.budget.used >= 0
        assert await trio.to_thread.run_sync(web.left.wait, 10)
        with trio.fail_after(10):
            await server.service.idle()

        assert server.service.intake.budget.used == 0
    assert server.engine.submitted == []


async def test_memory_is_given_back_when_the_request_ends(run_server: RunServer, seeing: TextModel, web: MediaServer) -> None:
    async with run_server(engine_type=SeeingEngine, model=seeing, allow_private_media=True) as server:
        budget = server.service.intake.budget
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, server, user(image(f"{web.url}/0"), image(f"{web.url}/0"), text("wait ab")))
            await server.engine.until_waiting()
            held = budget.used
            server.engine.release.set()
        with trio.fail_after(10):
            await server.service.idle()

        assert budget.used == 0
    ((_, _, media),) = server.engine.submitted
    assert held == len(media.media[0].patches)


async def test_a_large_body_needs_memory(run_server: RunServer, seeing: TextModel) -> None:
    large = data_uri(encode(picture(800, 800)))  # 1.9 MB
    answers = []
    async with run_server(engine_type=SeeingEngine, model=seeing, max_queue=1) as server:
        budget = server.service.intake.budget
        budget.size = 2**20

        async def send() -> None:
            answers.append(await ask(server, user(image(large), text("say a"))))

        with budget.open() as older:
            await older.take(2**20)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                with trio.fail_after(10):
                    while not budget.num_waiting:
                        await trio.lowlevel.checkpoint()
                refused = await ask(server, user(image(large), text("say a")))
                older.settle(0)

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full"
    assert [answer.status_code for answer in answers] == [200]


async def test_memory_for_a_body_is_taken_as_it_comes(
    run_server: RunServer, seeing: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends slowly holds little."""
    monkeypatch.setattr("dashinfer.serving.app.BODY_STEP", 2**18)
    body = json.dumps({**Running.body("say yes"), "metadata": "a" * 2**21}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        budget = server.service.intake.budget
        with trio.socket.from_stdlib_socket(server.connect()) as client:
            await client.send(head)
            with trio.fail_after(10):
                while not budget.used:
                    await trio.lowlevel.checkpoint()
            assert budget.used == 2**18
            await trio.SocketStream(client).send_all(body)
            answer = await client.recv(20)
            with trio.fail_after(10):
                await server.service.idle()

        assert budget.used == 0
    assert answer.startswith(b"HTTP/1.1 200")


async def test_bodies_may_be_larger_where_the_model_sees(run_server: RunServer, seeing: TextModel) -> None:
    body = json.dumps({**Running.body("say yes"), "metadata": "a" * (9 * 2**20)}).encode()

    async def pieces() -> Any:
        yield body

    async with run_server(engine_type=SeeingEngine, model=seeing) as server:
        declared = await server.client.post("/v1/chat/completions", content=body)
        chunked = await server.client.post("/v1/chat/completions", content=pieces())
    async with run_server(engine_type=SeeingEngine, model=seeing, max_media_bytes=2**18) as server:
        small = await server.client.post("/v1/chat/completions", content=body)

    assert [answer.status_code for answer in (declared, chunked, small)] == [200, 413, 413]
    assert "larger than 8 MiB" in small.json()["error"]["message"]


async def test_the_docs_show_images(run_server: RunServer) -> None:
    async with run_server() as server:
        document = (await server.client.get("/openapi.json")).json()

    schemas = document["components"]["schemas"]
    assert {"ImageUrlPart", "ImagePart", "VideoUrlPart", "VideoPart", "ImageUrl", "VideoUrl"} <= schemas.keys()
    assert {"image_tokens", "video_tokens"} <= schemas["PromptTokensDetails"]["properties"].keys()
