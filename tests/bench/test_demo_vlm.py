import math
import random
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from bench.demo_vlm import files
from bench.demo_vlm.data import Conversations, batches, lay_out
from bench.demo_vlm.evaluate import oracle
from bench.demo_vlm.files import IM_END, PREPROCESSOR, model_config, write_files
from bench.demo_vlm.held_out import held_out, tally
from bench.demo_vlm.network import Network
from bench.demo_vlm.pictures import MAX_ASPECT, Scene, draw_scene, paint
from bench.demo_vlm.questions import KINDS, Exchange, ask, ask_text
from dashinfer.models.vision_config import VisionConfig
from dashinfer.sources import TokenizerFiles
from dashinfer.sources.demo_vlm import DIRECTORY
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.vision.positions import Medium, place_media
from dashinfer.vision.preprocess import ImageProcessor


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


def scenes(count: int) -> list[Scene]:
    rng = random.Random("tests")
    return [draw_scene(rng) for _ in range(count)]


def test_pictures_come_from_the_seed_alone() -> None:
    first, second = scenes(20), scenes(20)

    assert first == second
    assert len(set(first)) == 20
    for scene in first:
        assert paint(scene).size == (scene.width, scene.height)
        assert np.array_equal(paint(scene), paint(scene))


def test_shapes_lie_in_the_picture_and_apart() -> None:
    for scene in scenes(200):
        assert max(scene.width, scene.height) / min(scene.width, scene.height) < MAX_ASPECT * 1.05
        for shape in scene.shapes:
            assert shape.radius <= shape.x <= scene.width - shape.radius
            assert shape.radius <= shape.y <= scene.height - shape.radius
        for one, other in combinations(scene.shapes, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) > one.radius + other.radius


def test_shapes_have_their_colour_and_the_background_another() -> None:
    for scene in scenes(50):
        pixels = np.asarray(paint(scene)).astype(float)
        for shape in scene.shapes:
            row, column = int(shape.y), int(shape.x)
            middle = pixels[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            assert math.dist(middle, shape.fill) < 45
            assert all(math.dist(shape.fill, end) > 100 for end in scene.background)


def test_a_question_has_one_answer() -> None:
    """Whatever the wording: asked again in other words, the same question is answered alike."""
    for index, scene in enumerate(scenes(40)):
        answers: dict[str, set[str]] = {}
        rng = random.Random(index)
        for _ in range(60):
            for exchange in ask(scene, rng, 6):
                answers.setdefault(exchange.question, set()).add(exchange.answer)
        assert {question: found for question, found in answers.items() if len(found) > 1} == {}


def test_every_kind_is_held_out_and_none_twice_alike() -> None:
    questions = list(held_out(60))

    assert {question.exchange.kind for question in questions} == {*KINDS, "pair"}
    assert len({question.pictures[0].tobytes() for question in questions}) == 60
    assert [question.exchange for question in held_out(60)] == [question.exchange for question in questions]


def test_tally() -> None:
    questions = list(held_out(2))
    answers = [questions[0].exchange.answer, "wrong"]

    assert tally(zip(questions, answers, strict=True)).splitlines()[-1].split() == ["all", "1", "of", "2", "50.0%"]


def test_training_rows_are_what_the_chat_template_makes(tokenizer: Tokenizer) -> None:
    class Always(random.Random):
        def random(self) -> float:
            return 0.5  # no system prompt, pictures first

    exchanges = [
        Exchange("what", "What is this?", "A red circle."),
        Exchange("count", "Count the shapes.", "There is one shape."),
    ]
    row = Conversations(tokenizer).row(exchanges, 2, Always())
    first, second = exchanges
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": first.question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.question},
        {"role": "assistant", "content": second.answer},
    ]
    source = TokenizerFiles(DIRECTORY / "tokenizer.json", {}, (DIRECTORY / "chat_template.jinja").read_text())
    rendered = ChatTemplate(source.chat_template, {}).render(messages, add_generation_prompt=False)

    assert row.tokens == tokenizer.encode(rendered).ids
    taught = [token for token, learn in zip(row.tokens, row.learned, strict=True) if learn]
    assert tokenizer.decode(taught, skip_special_tokens=False) == f"{first.answer}<|im_end|>{second.answer}<|im_end|>"


@pytest.mark.parametrize("text", ["Zürich, 日本, 🙂", "\x00\x7f \t\r\n", "<|im_start|>user\n"])
def test_any_text_can_be_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_packaged_files_are_what_the_script_writes(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "make_tokenizer", lambda: tokenizer)  # which takes seconds to make
    write_files(tmp_path)

    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DIRECTORY / path.name).read_bytes(), path.name


def test_packaged_weights_are_few_and_in_16_bits() -> None:
    with safe_open(DIRECTORY / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118

    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors) < 6e6
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_skipped_batches_are_those_that_would_have_come(tokenizer: Tokenizer) -> None:
    processor = ImageProcessor.from_hf(PREPROCESSOR)
    *_, third = islice(batches("tests", tokenizer, processor, 4), 3)
    later = next(batches("tests", tokenizer, processor, 4, skip=2))

    assert np.array_equal(later.tokens, third.tokens)
    assert all(np.array_equal(one, other) for one, other in zip(later.pictures, third.pictures, strict=True))


def test_training_computes_what_transformers_does(tokenizer: Tokenizer) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    w = {name: parameter.detach() for name, parameter in model.named_parameters()}
    processor = ImageProcessor.from_hf(PREPROCESSOR)
    network = Network(model_config(), fused=False)
    seen = {1: False, 2: False}
    for batch in islice(batches("tests", tokenizer, processor, 4), 60):
        if seen[len(batch.grids)] or batch.branches.any():
            continue
        seen[len(batch.grids)] = True
        pixels = [processor.pixel_values(values.reshape(-1, values.shape[-1])) for values in batch.pictures]
        features = [
            network.tower(w, torch.from_numpy(each).view(values.shape), grid).flatten(0, 1)
            for each, values, grid in zip(pixels, batch.pictures, batch.grids, strict=True)
        ]
        arrays = (torch.from_numpy(each) for each in (batch.tokens, batch.branches, batch.positions, batch.holders))
        logits = network.decoder(w, *arrays, torch.cat(features))[0] @ model.lm_head.weight.detach().T
        ids = torch.from_numpy(batch.tokens[:1])
        expected = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.cat([torch.from_numpy(processor.pixel_values(values[0])) for values in batch.pictures]),
            image_grid_thw=torch.tensor([list(grid) for grid in batch.grids]),
        ).logits
        real = int((batch.tokens[0] != model.config.text_config.pad_token_id).sum())
        torch.testing.assert_close(logits[0, :real], expected[0, :real], atol=2e-4, rtol=2e-4)
    assert all(seen.values())


def test_questions_side_by_side_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    """The tokens that one sees, at their positions, are those of a conversation with it alone."""
    conversations = Conversations(tokenizer)
    exchanges = [Exchange("", f"{word}?", f"{word}.") for word in ("What", "circle", "Count")]
    fan = conversations.fan(exchanges, 1)
    grid = (1, 4, 6)
    tokens, learned, branches, positions = lay_out(fan, [grid])
    for number, exchange in enumerate(exchanges, 1):
        alone = lay_out(conversations.fan([exchange], 1), [grid])
        visible = (branches == 0) | (branches == number)

        assert np.array_equal(tokens[visible], alone[0])
        assert np.array_equal(learned[visible], alone[1])
        assert np.array_equal(positions[:, visible], alone[3])
        assert alone[0][alone[1]].tolist() == [*tokenizer.encode(exchange.answer).ids, IM_END]


def test_positions_are_those_of_the_server(tokenizer: Tokenizer) -> None:
    row = Conversations(tokenizer).row([Exchange("", "What?", "A.")], 2, random.Random(0))
    grids = [(1, 4, 10), (1, 8, 6)]
    placement = place_media(row.tokens, [Medium("image", grid) for grid in grids], VisionConfig.from_hf(model_config()))
    tokens, _, _, positions = lay_out(row, grids)

    assert np.array_equal(tokens, placement.tokens)
    assert np.array_equal(positions, placement.positions)


def test_the_packaged_model_sees() -> None:
    """Through transformers alone, so a wrong answer of the server is the server's."""
    answer = oracle(DIRECTORY)
    questions = list(held_out(24))
    wrong = [(question.exchange, found) for question in questions if (found := answer(question)) != question.exchange.answer]

    assert len(wrong) <= 1, wrong


def test_without_a_picture_the_packaged_model_says_so() -> None:
    from bench.demo_vlm.held_out import Question

    rng = random.Random("tests")
    answer = oracle(DIRECTORY)
    exchanges = [ask_text(rng, scene) for scene in scenes(8)]

    assert sum(answer(Question((), exchange)) == exchange.answer for exchange in exchanges) >= 7
