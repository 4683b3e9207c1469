"""The runner on tiny random vision-language models, driven by plans made by hand, against transformers on the same weights."""

import math
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer.errors import InsufficientMemory, UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.memory import weight_bytes
from dashinfer.models.vision_shapes import tower_bytes
from dashinfer.types import (
    Alive,
    Chunk,
    Encode,
    Encoded,
    Enter,
    Forget,
    MediaSpan,
    ModelFiles,
    Progress,
    SamplingParams,
    Start,
    StepPlan,
    StepResult,
    WorkerConfig,
)
from dashinfer.vision.positions import Medium, Placement
from dashinfer.worker import media as media_module
from dashinfer.worker.capacity import encode_bytes, media_cache_bytes
from dashinfer.worker.frames import encode, parent_reader
from dashinfer.worker.runner import Runner, _image
from dashinfer.worker.supervisor import COMMAND
from tests.models import toy, vision_toy
from tests.models.vision_toy import Models, Prompt, prompt
from tests.worker.toy import PaddedGraphs

BLOCK_SIZE, BLOCKS = 8, 64  # a slot
SMALL, WIDE, TALL = Medium("image", (1, 4, 4)), Medium("image", (1, 6, 10)), Medium("image", (1, 14, 2))
CLIP = Medium("video", (3, 4, 6), seconds_per_step=0.75)
PARTS = (5, WIDE, 3, CLIP, SMALL, 1, TALL, 7)
COUNT = 10  # tokens that are produced


@pytest.fixture(scope="module", params=vision_toy.MARKED_FAMILIES)
def models(request, tmp_path_factory) -> Models:
    return vision_toy.make(request.param, tmp_path_factory.mktemp(request.param))


def worker_config(models: Models, **changes) -> WorkerConfig:
    config = WorkerConfig(
        rank=0,
        world_size=1,
        files=ModelFiles("toy", "safetensors", toy.weight_files(models.folder), models.config),
        device="cpu",
        data_type="float32",
        load_format="auto",
        max_batch=4,
        max_length=BLOCK_SIZE * BLOCKS,
        max_step_tokens=None,
        block_size=BLOCK_SIZE,
        kv_cache_memory=4 << 20,
        vision=True,
        vision_engine="native",
        pixel_values=vision_toy.PIXEL_VALUES.numpy().tobytes(),
    )
    return msgspec.structs.replace(config, **changes)


def load(models: Models, **changes) -> Runner:
    return Runner(worker_config(models, **changes), ModelConfig.from_hf(models.config, vision=True), lambda *_: None)


@pytest.fixture(scope="module", params=["plain", "graphs"])
def runner(request, models) -> Runner:
    loaded = load(models)
    if request.param == "graphs":
        loaded._executor.use_graphs(PaddedGraphs)
    return loaded


def messages(asked: Prompt) -> list[Encode]:
    pairs = zip(asked.media, asked.patches, strict=True)
    return [Encode(key(patches), medium.grid, patches.numpy().tobytes()) for medium, patches in pairs]


def key(patches) -> bytes:
    return patches.numpy().tobytes()[:32]


def enter(slot: int, asked: Prompt, produced: Sequence[int] = (), **changes) -> Enter:
    placement = asked.placement
    tokens = [*placement.tokens.tolist(), *produced]
    flat = not asked.media
    return Enter(
        slot,
        np.array(tokens, "<i4").tobytes(),
        len(placement.tokens),
        SamplingParams(**({"max_tokens": 99, "seed": 0, "temperature": 0.0, "logprobs": 3} | changes)),
        tuple(MediaSpan(key(asked.patches[span.medium]), span.start, span.offset, span.length) for span in placement.spans),
        b"" if flat else placement.positions.astype("<i4").tobytes(),
        placement.delta,
    )


@dataclass
class Slot:
    """A sequence's state, as a scheduler has it."""

    length: int
    computed: int = 0
    produced: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)


def generate(
    runner: Runner,
    prompts: Sequence[Prompt],
    *,
    chunk: int = 999,
    count: int = COUNT,
    late: Sequence[int] = (),
    cached: Sequence[int] = (),
) -> list[Slot]:
    """All prompts at once, each in chunks of `chunk` tokens; the blocks of slot i are BLOCKS * i and on, backwards.

    Args:
        late: how many steps later each one begins.
        cached: leading tokens of each that are in its blocks already.
    """
    held = {message.key: message for asked in prompts for message in messages(asked)}
    for message in held.values():
        runner.media.ask(message)
    slots = [Slot(len(asked.placement.tokens)) for asked in prompts]
    late, cached = (list(each) or [0] * len(slots) for each in (late, cached))
    step = 0
    while any(len(slot.produced) < count for slot in slots):
        entering, chunks = [], []
        for index, slot in enumerate(slots):
            if step < late[index] or len(slot.produced) == count:
                continue
            if step == late[index]:
                entering.append(enter(index, prompts[index]))
                slot.computed = cached[index]
            length = min(chunk, slot.length + len(slot.produced) - slot.computed)
            last = slot.computed + length == slot.length + len(slot.produced)
            first = 0 if step == late[index] else -(-slot.computed // BLOCK_SIZE)
            blocks = range(first, -(-(slot.computed + length) // BLOCK_SIZE))
            new = tuple(BLOCKS * (index + 1) - 1 - block for block in blocks)
            chunks.append(Chunk(index, slot.computed, length, last, new))
        chunks.sort(key=lambda each: not (each.length == 1 and each.sample))
        apply(runner.execute(StepPlan(step, entering, chunks)), chunks, slots)
        step += 1
    runner.media.forget(held)
    return slots


def apply(result: StepResult, chunks: Sequence[Chunk], slots: Sequence[Slot]) -> None:
    samplers = [chunk for chunk in chunks if chunk.sample]
    assert result.failed == []
    for chunk in chunks:
        slots[chunk.slot].computed += chunk.length
    for index, (chunk, token) in enumerate(zip(samplers, result.tokens, strict=True)):
        slots[chunk.slot].produced.append(token)
        slots[chunk.slot].logprobs.append(result.logprobs[index])


@dataclass
class Reference:
    tokens: list[int]
    logprobs: torch.Tensor  # [COUNT, vocab]


def reference(models: Models, asked: Prompt) -> Reference:
    inputs = asked.reference_inputs(models.family)
    with torch.inference_mode():
        out = models.reference.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=COUNT,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Reference(out.sequences[0, len(asked.placement.tokens) :].tolist(), torch.cat(out.logits).log_softmax(-1))


def assert_same(slot: Slot, right: Reference) -> None:
    assert slot.produced == right.tokens
    for logprobs, expected in zip(slot.logprobs, right.logprobs, strict=True):
        assert logprobs.top_logprobs == pytest.approx(expected[list(logprobs.top_tokens)].tolist(), abs=5e-4)
        assert logprobs.top_tokens == tuple(expected.topk(3).indices.tolist())


@pytest.fixture(scope="module")
def prompts(models) -> list[Prompt]:
    config = models.vision_config
    return [
        prompt(config, PARTS),
        prompt(config, (13,), seed=1),
        prompt(config, (2, TALL, 1, TALL, 4), seed=2),
        prompt(config, (1, CLIP), seed=3),
    ]


@pytest.fixture(scope="module")
def references(models, prompts) -> list[Reference]:
    return [reference(models, asked) for asked in prompts]


def test_what_it_says_when_it_is_ready(models, runner):
    ready, config = runner.ready, models.vision_config

    assert (ready.mode, ready.vision_engine) == ("vlm", "native")
    assert ready.media_token_bytes == 48 * 4 * (1 + len(config.deepstack_blocks))
    assert ready.media_cache_bytes >= BLOCK_SIZE * BLOCKS * ready.media_token_bytes
    assert ready.weight_bytes == models.decoder.weight_bytes + tower_bytes(config, 4)
    assert ready.activation_bytes > encode_bytes(config, 4096) > 4096 * 32 * 56


def test_prompts_with_pictures_get_the_tokens_of_transformers(runner, prompts, references):
    for asked, right in zip(prompts, references, strict=True):
        (alone,) = generate(runner, [asked])
        assert_same(alone, right)


@pytest.mark.parametrize("chunk", [11, 3])
def test_in_one_batch_and_in_chunks_that_cut_through_pictures(runner, prompts, references, chunk):
    slots = generate(runner, prompts, chunk=chunk, late=[0, 3, 1, 2])

    for slot, right in zip(slots, references, strict=True):
        assert_same(slot, right)


def test_a_chunk_that_starts_after_pictures_does_without_them(runner, prompts, references):
    asked, right = prompts[0], references[0]
    generate(runner, [asked])
    seen = len(asked.placement.tokens) // BLOCK_SIZE * BLOCK_SIZE
    last = max(span.start + span.length for span in asked.placement.spans)

    slot = Slot(len(asked.placement.tokens), computed=last)
    blocks = tuple(BLOCKS - 1 - block for block in range(-(-slot.length // BLOCK_SIZE)))
    chunks = [Chunk(1, last, slot.length - last, True, blocks)]
    result = runner.execute(StepPlan(0, [enter(1, asked)], chunks))

    assert result.tokens == right.tokens[:1]
    for cached in (16, 24, seen):  # before, within and after the first picture
        assert_same(generate(runner, [asked], cached=[cached])[0], right)


def test_a_prompt_whose_last_token_alone_is_computed(runner, models):
    """Which is the last of a picture: its positions are its own, and not those of text."""
    asked = prompt(models.vision_config, (3, TALL))
    whole = asked.placement
    end = whole.spans[-1].start + whole.spans[-1].length
    positions = whole.positions[:, :end]
    placement = Placement(whole.tokens[:end], whole.spans, positions, int(positions.max()) + 1 - end)
    asked = Prompt(placement, asked.media, asked.patches)
    with torch.inference_mode():
        expected = models.reference(**asked.reference_inputs(models.family)).logits[0, -1].log_softmax(-1)

    ways = ({}, {"cached": [end - 1]}, {"chunk": end - 1})
    slots = [generate(runner, [asked], count=4, **way)[0] for way in ways]

    assert slots[0].produced == slots[1].produced == slots[2].produced
    for slot in slots:
        assert slot.logprobs[0].top_logprobs == pytest.approx(expected.topk(3).values.tolist(), abs=5e-4)


def test_a_preempted_sequence_goes_on(runner, prompts, references):
    asked, right = prompts[0], references[0]
    produced, length = right.tokens[:4], len(asked.placement.tokens) + 4
    for message in messages(asked):
        runner.media.ask(message)
    blocks = tuple(range(-(-length // BLOCK_SIZE)))
    first, second = Chunk(2, 0, length - 3, False, blocks), Chunk(2, length - 3, 3, True, ())
    results = [runner.execute(plan) for plan in (StepPlan(0, [enter(2, asked, produced)], [first]), StepPlan(1, [], [second]))]
    runner.media.forget([message.key for message in messages(asked)])

    assert results[1].tokens == right.tokens[4:5]


def test_a_slot_forgets_what_it_showed(runner, prompts, references):
    generate(runner, [prompts[0]])

    assert_same(generate(runner, [prompts[1]])[0], references[1])


def test_another_picture_gives_another_answer(runner, models):
    asked, other = (prompt(models.vision_config, (4, WIDE, 3), seed) for seed in (0, 1))
    (seen,) = generate(runner, [asked])
    (changed,) = generate(runner, [Prompt(asked.placement, asked.media, other.patches)])

    assert seen.logprobs[0].top_logprobs != pytest.approx(changed.logprobs[0].top_logprobs, abs=1e-3)


def test_the_text_side_alone(models, prompts, references):
    runner = load(models, vision=False, pixel_values=b"")
    tokens = prompts[1].placement.tokens
    blocks = tuple(range(4))
    results = [runner.execute(StepPlan(0, [enter(0, prompts[1])], [Chunk(0, 0, len(tokens), True, blocks)]))]
    for step in range(1, COUNT):
        results.append(runner.execute(StepPlan(step, [], [Chunk(0, len(tokens) + step - 1, 1, True, ())])))

    assert (runner.ready.mode, runner.ready.vision_engine, runner.media) == ("llm", None, None)
    assert runner.ready.weight_bytes == models.decoder.weight_bytes
    assert [result.tokens[0] for result in results] == references[1].tokens


def test_random_weights_see_too(models):
    runner = load(models, load_format="dummy", files=ModelFiles("toy", "safetensors", (), models.config))
    (slot,) = generate(runner, [prompt(models.vision_config, (2, SMALL, 2))], count=2)

    assert len(slot.produced) == 2


@pytest.mark.parametrize("quant_type", ["a16w8", "fp8"])
def test_quantised_decoders_have_the_tower_as_it_is(models, quant_type):
    plain, rounded = (load(models, data_type="bfloat16", quant_type=each) for each in (None, quant_type))
    asked = prompt(models.vision_config, PARTS)
    seen = []
    for runner in (plain, rounded):
        for message in messages(asked):
            runner.media.ask(message)
        runner.media.finish([key(asked.patches[0])])
        seen.append(runner.media[key(asked.patches[0])])

    assert rounded.ready.weight_bytes < plain.ready.weight_bytes
    assert torch.equal(seen[0].embeddings, seen[1].embeddings)
    assert seen[1].embeddings.dtype == torch.bfloat16
    assert len(generate(rounded, [prompt(models.vision_config, (2, SMALL, 2), seed=5)], count=2)[0].produced) == 2


def test_long_videos_are_encoded_in_pieces(models, monkeypatch):
    asked = prompt(models.vision_config, (1, Medium("video", (7, 4, 6)), 1, SMALL, 2))
    batches = []
    steps = type(models.tower).steps

    def record(tower, patches, grids):
        batches.append(list(grids))
        return steps(tower, patches, grids)

    expected = asked.encode(models.tower)
    monkeypatch.setitem(media_module.BATCH_PATCHES, "cpu", 64)
    runner = load(models)
    monkeypatch.setattr(type(models.tower), "steps", record)
    for message in messages(asked):
        runner.media.ask(message)
    runner.media.finish([key(asked.patches[1])])
    seen = runner.media[key(asked.patches[0])]

    assert batches == [[(2, 4, 6)], [(2, 4, 6)], [(2, 4, 6)], [(1, 4, 6), (1, 4, 4)]]
    torch.testing.assert_close(seen.embeddings, expected.embeddings[:42], atol=1e-5, rtol=1e-5)
    assert len(seen.deepstack) == len(expected.deepstack)
    for level, right in zip(seen.deepstack, expected.deepstack, strict=True):
        torch.testing.assert_close(level, right[:42], atol=1e-5, rtol=1e-5)


def test_the_weights_of_the_tower_need_memory_too(models, monkeypatch):
    needed = weight_bytes(ModelConfig.from_hf(models.config, vision=True), 4, 1) + models.tower.weight_bytes
    monkeypatch.setattr("dashinfer.worker.runner.free_memory", lambda *_: needed - 1000)
    with pytest.raises(InsufficientMemory, match="the weights need"):
        load(models)


def test_the_cache_of_embeddings_leaves_less_for_keys_and_values(models, monkeypatch):
    monkeypatch.setattr("dashinfer.worker.runner.free_memory", lambda *_: 64 << 20)
    sizes = (1 << 20, 5 << 20)
    few, many = (load(models, kv_cache_memory=None, max_batch=999, media_cache_memory=size).ready for size in sizes)

    assert (few.media_cache_bytes, many.media_cache_bytes) == sizes
    assert few.kv_cache_bytes - many.kv_cache_bytes == pytest.approx(4 << 20, abs=10_000)
    with pytest.raises(InsufficientMemory, match=r"^toy: --media-cache-memory asks for 64 MiB, but only"):
        load(models, media_cache_memory=64 << 20)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 256 << 20),
        ({"free": 1 << 30}, (1 << 30) // 20),
        ({"free": 1 << 20}, 100 * 1000),  # one large image at least
        ({"free": 1 << 20, "max_length": 1 << 20}, 16384 * 1000),
        ({"device": torch.device("cuda")}, 1 << 30),
        ({"requested": 5}, 5),
    ],
)
def test_how_much_memory_embeddings_get(changes, expected):
    settings = {
        "requested": None,
        "free": 64 << 30,
        "token_bytes": 1000,
        "max_length": 100,
        "device": torch.device("cpu"),
    }
    assert media_cache_bytes("toy", **(settings | changes)) == expected


def test_memory_that_runs_out_while_encoding_is_one_line(models, monkeypatch):
    runner = load(models)

    def steps(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        yield

    monkeypatch.setattr(type(models.tower), "steps", steps)
    runner.media.ask(messages(prompt(models.vision_config, (SMALL,)))[0])
    with pytest.raises(InsufficientMemory, match=r"^toy: memory ran out while images were encoded; lower --max-pixels, "):
        runner.media.advance(0)


def test_towers_that_do_not_fit_are_refused(models):
    with pytest.raises(UnsupportedModel, match=r"gguf file has no vision tower .*--mode llm"):
        load(models, files=ModelFiles("toy", "gguf", ("x.gguf",), models.config))
    key = "hidden_size" if models.family == "qwen2-vl" else "out_hidden_size"
    config = models.config | {"vision_config": models.config["vision_config"] | {key: 40}}
    with pytest.raises(UnsupportedModel, match=r"embeddings have the size 40, and the decoder's 48"):
        load(models, files=ModelFiles("toy", "safetensors", toy.weight_files(models.folder), config))


def test_what_a_gpu_is_warmed_up_with(models, runner):
    runner._warm_up_sight(models.vision_config, runner.ready.max_length)

    assert not runner.media.pending
    assert runner.media.take_new() == []
    for patches, grid in ((4096, (1, 64, 64)), (8, (1, 2, 4)), (4, (1, 2, 2)), (1, (1, 2, 2))):
        image = _image(models.vision_config, patches)
        assert (image.grid, len(image.patches)) == (grid, 96 * math.prod(grid))


@pytest.mark.parametrize("models", ["qwen3-vl"], indirect=True)
def test_a_rank_in_a_process_of_its_own(models, prompts, references):
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen([*COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()]):
        theirs.close()
        ours.settimeout(60)
        reader = parent_reader()

        def receive():
            while True:
                for message in reader.feed(ours.recv(1 << 16)):
                    if not isinstance(message, Alive):
                        yield message

        received = (message for message in receive() if not isinstance(message, Progress))
        asked, reading = prompts[0], prompts[1]
        length = len(reading.placement.tokens)
        ours.sendall(encode(Start(worker_config(models))))
        assert next(received).mode == "vlm"
        for message in messages(asked):
            ours.sendall(encode(message))
        plans = [StepPlan(0, [enter(1, reading)], [Chunk(1, 0, length, True, (0, 1, 2, 3))])]
        plans += [StepPlan(step, [], [Chunk(1, length + step - 1, 1, True, ())]) for step in range(1, 4)]
        for plan in plans:
            ours.sendall(encode(plan))
        told, results = set(), []
        while len(told) < len(asked.media) or len(results) < 4:
            match next(received):
                case Encoded(keys):
                    told |= set(keys)
                case StepResult() as result:
                    results += result.tokens
        assert told == {message.key for message in messages(asked)}
        assert results == references[1].tokens[:4]
        blocks = tuple(range(5, 5 + -(-len(asked.placement.tokens) // BLOCK_SIZE)))
        ours.sendall(encode(StepPlan(9, [enter(0, asked)], [Chunk(0, 0, len(asked.placement.tokens), True, blocks)])))
        assert next(received).tokens == references[0].tokens[:1]
        ours.sendall(encode(Forget([*told])))
        ours.shutdown(socket.SHUT_RDWR)


def test_a_quantised_checkpoint_has_its_tower_in_16_bits(models, tmp_path):
    """8-bit matrices in the decoder, with a scale each; the same numbers in full are the reference."""
    weights = load_file(models.folder / "model.safetensors")
    quantised, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight") and "layers." in name:
            scale = weight.abs().max() / 448
            quantised[name] = (weight / scale).to(torch.float8_e4m3fn)
            quantised[name.replace(".weight", ".weight_scale")] = scale.reshape(1)
            plain[name] = quantised[name].float() * scale
    table = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["visual", "lm_head"]}
    asked, logprobs = prompt(models.vision_config, PARTS), []
    for tensors, extra in ((quantised, {"quantization_config": table}), (plain, {})):
        save_file(tensors, tmp_path / "model.safetensors")
        files = ModelFiles("toy", "safetensors", toy.weight_files(tmp_path), models.config | extra)
        config = worker_config(models, files=files)
        runner = Runner(config, ModelConfig.from_hf(files.config, vision=True), lambda *_: None)
        logprobs.append([each.top_logprobs for each in generate(runner, [asked], count=3)[0].logprobs])
        assert runner.ready.mode == "vlm"

    assert len(quantised) == len(weights) + 3 * 7
    for left, right in zip(*logprobs, strict=True):
        assert left == pytest.approx(right, abs=1e-3)


def test_progress_counts_the_bytes_of_both(models):
    reports = []
    config = ModelConfig.from_hf(models.config, vision=True)
    Runner(worker_config(models), config, lambda stage, done, total, unit: reports.append((done, total)))
    totals = {total for _, total in reports}
    done = [done for done, _ in reports]

    assert totals == {sum(weight.nbytes for weight in load_file(models.folder / "model.safetensors").values())}
    assert done == sorted(done)
    assert done[-1] in totals
