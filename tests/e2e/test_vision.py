"""The demo model that sees, over HTTP in float32: what it answers follows from the pictures, and equals transformers."""

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image, ImageDraw

from dashinfer.sources import ModelSource
from dashinfer.sources.resolve import resolve

from .conftest import ServerProcess

pytestmark = [pytest.mark.feature("Vision", "Images"), pytest.mark.feature("Models", "Qwen2-VL, Qwen2.5-VL")]

NAME = "demo-vlm"
MAX_TOKENS = 16
Part = str | Image.Image
Turns = list[list[Part]]  # user first


def picture(number: int) -> Image.Image:
    """Coloured shapes on a background, of a size of its own."""
    draws = random.Random(number)
    size = (draws.randint(60, 260), draws.randint(60, 260))
    image = Image.new("RGB", size, draws.choice(["white", "black", "grey", "beige"]))
    draw = ImageDraw.Draw(image)
    for _ in range(draws.randint(1, 3)):
        side, left, top = draws.randint(20, 50), draws.randint(0, size[0] - 50), draws.randint(0, size[1] - 50)
        shape = draws.choice([draw.ellipse, draw.rectangle])
        shape((left, top, left + side, top + side), fill=draws.choice(["red", "green", "blue", "yellow"]))
    return image


def conversations() -> list[Turns]:
    """One to three pictures of mixed sizes, before, between and after text, in one turn or several; and text alone."""
    pictures = [picture(number) for number in range(14)]
    asks = ["What is in this picture?", "How many shapes are there?", "What colour is the shape?", "Where is the circle?"]
    return [
        *([[each, asks[number % 4]]] for number, each in enumerate(pictures[:6])),
        [["Look at this:", pictures[6], "and at this:", pictures[7], asks[0]]],
        [[pictures[8], pictures[9], pictures[10], asks[1]]],
        [[asks[2], pictures[11]], ["The shape is red."], ["And here?", pictures[12]]],
        [[pictures[0], pictures[0], asks[3]]],
        [["Hello"]],
        [["What can you do?"], ["I look at pictures."], [pictures[13], asks[0]]],
    ]


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(turns: Turns) -> list[dict[str, Any]]:
    def content(parts: list[Part]) -> Any:
        if parts and all(isinstance(part, str) for part in parts):
            return " ".join(map(str, parts))
        return [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_uri(part)}}
            for part in parts
        ]

    return [{"role": ("user", "assistant")[number % 2], "content": content(parts)} for number, parts in enumerate(turns)]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve(NAME)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = ServerProcess.start("--model", NAME, "--data-type", "float32", "--kv-cache-memory", "64MiB")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def crowded() -> Iterator[ServerProcess]:
    """Chunks of prompts that end within pictures, room for a few sequences, and for the embeddings of one picture or two."""
    server = ServerProcess.start(
        "--model", NAME, "--data-type", "float32", "--max-length", "512", "--max-step-tokens", "40", "--max-batch", "8",
        "--kv-cache-memory", "3MiB", "--block-size", "8", "--media-cache-memory", "20KiB",
    )  # fmt: skip
    yield server
    assert server.stop() == 0


def client_of(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)


def ask(server: ServerProcess, turns: Turns, **options: Any) -> Any:
    with client_of(server) as client:
        options = {"temperature": 0, "max_tokens": MAX_TOKENS, **options}
        return client.chat.completions.create(model=NAME, messages=messages(turns), **options)


def answer(server: ServerProcess, turns: Turns) -> str:
    return ask(server, turns).choices[0].message.content


@pytest.fixture(scope="module")
def expected(source: ModelSource) -> list[str]:
    """transformers' greedy answers, one conversation at a time."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = source.files.weights[0].rsplit("/", 1)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for turns in conversations():
        images = [part for parts in turns for part in parts if isinstance(part, Image.Image)]
        rendered = tokenizer.apply_chat_template(messages(turns), tokenize=False, add_generation_prompt=True)
        seen: dict[str, Any] = {}
        if images:
            seen = dict(processor(images=images, return_tensors="pt"))
            for grid in seen["image_grid_thw"]:
                rendered = rendered.replace("<|image_pad|>", "<|pad|>" * int(grid.prod() // 4), 1)
            rendered = rendered.replace("<|pad|>", "<|image_pad|>")
        ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
        kinds = (ids == model.config.image_token_id).int()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            **seen,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def test_the_model_is_found_to_see(server: ServerProcess) -> None:
    assert any("vlm" in line for line in server.lines)


def test_what_is_answered_follows_from_the_picture(server: ServerProcess) -> None:
    for colour in ("red", "green", "blue"):
        image = Image.new("RGB", (140, 140), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 100, 100), fill=colour)

        assert colour in answer(server, [[image, "What colour is the circle?"]])


def test_the_readmes_picture_has_the_readmes_answer(server: ServerProcess) -> None:
    root = Path(__file__).parents[2]
    said = answer(server, [[Image.open(root / "dashinfer" / "demo_vlm" / "picture.png"), "What is in this picture?"]])

    assert f'"content":"{said}"' in (root / "README.md").read_text(encoding="utf-8")


def test_answers_are_those_of_transformers(server: ServerProcess, expected: list[str]) -> None:
    assert [answer(server, turns) for turns in conversations()] == expected
    assert len(set(expected)) > 6


@pytest.mark.parametrize("name", ["server", "crowded"])
def test_so_are_those_of_all_at_once(name: str, request: pytest.FixtureRequest, expected: list[str]) -> None:
    server = request.getfixturevalue(name)
    several = conversations() * 2
    with ThreadPoolExecutor(len(several)) as threads:
        answers = list(threads.map(lambda turns: answer(server, turns), several))

    assert answers == expected * 2


def test_a_picture_seen_before_is_not_computed_again_and_another_is(server: ServerProcess) -> None:
    first, other = Image.new("RGB", (168, 168), "red"), Image.new("RGB", (168, 168), "red")
    other.putpixel((167, 167), (0, 0, 0))
    usages = [ask(server, [[image, "What is in this picture?"]]).usage for image in (first, first, other)]
    details = [usage.prompt_tokens_details for usage in usages]

    assert {usage.prompt_tokens for usage in usages} == {usages[0].prompt_tokens}
    assert details[0].image_tokens == 36
    assert details[1].cached_tokens >= 36
    assert details[2].cached_tokens < 36
