"""The section `vlm`: Qwen2-VL-7B's shape with random weights, a picture of a megapixel in each request."""

import io
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from bench.gpu.inprocess import InProcess
from bench.gpu.workload import QWEN_2_VL_7B, TOY_VL
from dashinfer.bench.pictures import draw
from dashinfer.engine.api import Medium, PromptMedia
from dashinfer.engine.scheduler import Scheduler, Update
from dashinfer.engine.sequence import Sequence
from dashinfer.models.vision_config import VisionConfig
from dashinfer.types import MediaSpan, SamplingParams, StepPlan
from dashinfer.vision import positions
from dashinfer.vision.decode import decode_picture
from dashinfer.vision.preprocess import ImageProcessor

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Requests of one picture and `text_tokens` random tokens, greedy, answers of full length.

    Attributes:
        size: of a picture, in pixels.
        requests: for each concurrency, how many.
    """

    config: dict[str, Any]
    size: tuple[int, int]
    text_tokens: int
    output_tokens: int
    requests: dict[int, int]


@dataclass(frozen=True)
class Prompt:
    """`seconds`: that its picture took from a JPEG file to patches, on one core."""

    tokens: list[int]
    media: PromptMedia
    seconds: float


def make_workload(*, toy: bool) -> Workload:
    if toy:
        return Workload(TOY_VL, (40, 24), 5, 4, {1: 2, 3: 6})
    return Workload(QWEN_2_VL_7B, (1000, 1000), 32, 64, {1: 5, 32: 96})


def run(emit: Callable[[Row], None], *, deadline: float, toy: bool) -> None:
    """Measure every concurrency until `deadline`, of `time.monotonic`."""
    workload = make_workload(toy=toy)
    vision = VisionConfig.from_hf(workload.config)
    processor = ImageProcessor(patch_size=vision.patch_size, max_pixels=12_845_056)
    longest = len(make_prompt(workload, vision, processor, "longest").tokens)
    started = time.monotonic()
    engine = InProcess.load(
        workload.config,
        device="cpu" if toy else "cuda",
        data_type="float32" if toy else "bfloat16",
        max_batch=max(workload.requests),
        max_length=longest + workload.output_tokens + 48,
        pixel_values=processor.table().tobytes(),
    )
    emit({"section": "vlm", "load_seconds": time.monotonic() - started, "blocks": engine.runner.ready.num_blocks})
    for concurrency, requests in workload.requests.items():
        if time.monotonic() > deadline:
            emit({"section": "vlm", "batch": concurrency, "status": "not measured: out of time"})
            continue
        warm = [make_prompt(workload, vision, processor, f"warm {concurrency} {each}") for each in range(concurrency)]
        Session(engine, workload, warm, concurrency).run()
        prompts = [make_prompt(workload, vision, processor, f"{concurrency} {each}") for each in range(requests)]
        session = Session(engine, workload, prompts, concurrency)
        session.run()
        emit(session.row())


def make_prompt(workload: Workload, vision: VisionConfig, processor: ImageProcessor, seed: str) -> Prompt:
    """A picture that no other seed has, between a few random tokens."""
    file = io.BytesIO()
    draw(seed, workload.size).save(file, "JPEG")
    began = time.perf_counter()
    picture: Image.Image = decode_picture(file.getvalue())
    patches = processor.patches(picture)
    seconds = time.perf_counter() - began
    draws, most = random.Random(seed), min(vision.image_token, vision.video_token, workload.config["vision_start_token_id"])
    text = [draws.randrange(most) for _ in range(workload.text_tokens)]
    start, end = workload.config["vision_start_token_id"], workload.config["vision_end_token_id"]
    placed = positions.place_media(
        [text[0], start, vision.image_token, end, *text[1:]], [positions.Medium("image", patches.grid)], vision
    )
    medium = Medium(seed.encode(), patches.grid, patches.values.tobytes(), vision.num_tokens(patches.grid))
    spans = tuple(MediaSpan(medium.key, span.start, span.offset, span.length) for span in placed.spans)
    media = PromptMedia((medium,), spans, placed.positions.astype("<i4").tobytes(), placed.delta)
    return Prompt(placed.tokens.tolist(), media, seconds)


class Session:
    """A closed loop: `concurrency` requests at a time, the next one sent as soon as one is answered."""

    def __init__(self, engine: InProcess, workload: Workload, prompts: list[Prompt], concurrency: int) -> None:
        self._engine = engine
        self._prompts = prompts
        self._concurrency = concurrency
        self._waiting = iter(prompts)
        self._params = SamplingParams(max_tokens=workload.output_tokens, seed=0, temperature=0.0)
        self._sent: dict[Sequence, float] = {}
        self._ttfts: list[float] = []
        self._tpots: list[float] = []
        self._first: dict[Sequence, float] = {}

    def run(self) -> None:
        self._scheduler: Scheduler = self._engine.new_scheduler()
        self._began = time.perf_counter()
        for _ in range(self._concurrency):
            self._send()
        with torch.inference_mode():
            self._engine.run(self._scheduler, self._on_step, lambda plan: None)
        self._seconds = time.perf_counter() - self._began
        assert len(self._ttfts) == len(self._prompts)

    def row(self) -> Row:
        """Figures of the session that has run. Times in milliseconds."""
        media = self._prompts[0].media
        return {
            "section": "vlm",
            "batch": self._concurrency,
            "status": "ok",
            "requests": len(self._prompts),
            "image_tokens": sum(span.length for span in media.spans),
            "prepare_p50_ms": statistics.median(prompt.seconds for prompt in self._prompts) * 1e3,
            "ttft_p50_ms": statistics.median(self._ttfts) * 1e3,
            "ttft_max_ms": max(self._ttfts) * 1e3,
            "tpot_p50_ms": statistics.median(self._tpots) * 1e3,
            "requests_per_second": len(self._prompts) / self._seconds,
        }

    def _send(self) -> None:
        if (prompt := next(self._waiting, None)) is not None:
            sequence = Sequence(len(prompt.tokens), list(prompt.tokens), self._params, prompt.media)
            self._sent[sequence] = time.perf_counter()
            self._scheduler.add(sequence)

    def _on_step(self, plan: StepPlan, updates: list[Update]) -> None:
        now = time.perf_counter()
        for update in updates:
            sequence = update.sequence
            assert not update.failed
            if sequence.num_output == 1:
                self._first[sequence] = now
                self._ttfts.append(now - self._sent[sequence])
            if update.finish:
                self._tpots.append((now - self._first[sequence]) / (sequence.num_output - 1))
                self._send()
