"""Tiny random vision-language models made with transformers, ours on the same weights, and prompts with pictures for both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dashinfer.models.checkpoint_parts import tower_part
from dashinfer.models.config import ModelConfig
from dashinfer.models.decoder import DecoderLM, InputEmbeddings
from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer.models.loader import load_model
from dashinfer.models.parallel import Group
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_qwen import VisionOutput, VisionTower
from dashinfer.models.weights import SafetensorsSource, WeightReader
from dashinfer.vision.positions import Medium, Placement, place_media
from dashinfer_kernels import PagedBatch

from . import toy

IMAGE, VIDEO, START, END = 90, 91, 92, 93
TEXT = toy.SIZES | {
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": ("Qwen2VL", {}, {"depth": 3, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4}),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {},
        {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 52,
            "out_hidden_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {"head_dim": 16, "rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [4, 2, 2]}},
        {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 56,
            "out_hidden_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
    ),
}
ROWS = {family: "Qwen3-VL" if family == "qwen3-vl" else "Qwen2-VL, Qwen2.5-VL" for family in FAMILIES}  # of README's table
MARKED_FAMILIES = [pytest.param(family, marks=pytest.mark.feature("Models", row)) for family, row in ROWS.items()]
# What a byte becomes; each channel has its own.
PIXEL_VALUES = torch.linspace(-1.5, 1.5, 256) * torch.tensor([[1.0], [0.8], [1.1]]) + torch.tensor([[0.1], [0.0], [-0.2]])


@dataclass(frozen=True)
class Models:
    """A family's reference, ours, and the folder that both come from."""

    family: str
    reference: Any
    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def vision_config(self) -> VisionConfig:
        return VisionConfig.from_hf(self.config)

    @cached_property
    def decoder(self) -> DecoderLM:
        return load_decoder(self.folder, self.config)

    @cached_property
    def tower(self) -> VisionTower:
        return load_tower(self.folder, self.config)


def make(family: str, folder: Path) -> Models:
    import transformers

    name, text, vision = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=vision, **TOKENS)
    torch.manual_seed(0)
    reference = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            norm = "norm" in name or "ln_q" in name
            weight.normal_(1 if norm and name.endswith("weight") else 0, 0.1 if weight.ndim == 1 else 0.2)
    reference.save_pretrained(folder)
    return Models(family, reference, folder)


def load_decoder(folder: Path, config: dict[str, Any], data_type: str = "float32") -> DecoderLM:
    model_config = ModelConfig.from_hf(config, vision=True)
    decoder, _ = load_model(
        toy.worker_config(toy.weight_files(folder), config, data_type=data_type),
        model_config,
        max_length=512,
        device=torch.device("cpu"),
        free=1 << 40,
        group=Group(),
        report=lambda *_: None,
    )
    return decoder


def load_tower(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> VisionTower:
    source = tower_part(SafetensorsSource(toy.weight_files(folder)))
    with WeightReader(source, dtype=dtype, device=torch.device("cpu"), report=lambda *_: None) as reader:
        return VisionTower(VisionConfig.from_hf(config), reader, PIXEL_VALUES)


@dataclass(frozen=True)
class Prompt:
    """Text and media for both models. `patches` are of each medium, uint8 [patches, 96]."""

    placement: Placement
    media: tuple[Medium, ...]
    patches: tuple[Tensor, ...]

    def reference_inputs(self, family: str) -> dict[str, Any]:
        tokens = torch.from_numpy(self.placement.tokens).long()
        inputs = {"input_ids": tokens[None], "mm_token_type_ids": ((tokens == IMAGE) + 2 * (tokens == VIDEO)).int()[None]}
        for kind, pixels, grids in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            chosen = [index for index, medium in enumerate(self.media) if medium.kind == kind]
            if chosen:
                inputs[pixels] = pixel_values(torch.cat([self.patches[index] for index in chosen]))
                inputs[grids] = torch.tensor([self.media[index].grid for index in chosen])
        seconds = [medium.seconds_per_step for medium in self.media if medium.kind == "video"]
        return inputs | ({"second_per_grid_ts": seconds} if seconds and family == "qwen2.5-vl" else {})

    def encode(self, tower: VisionTower) -> VisionOutput:
        return tower.encode(torch.cat(self.patches), [medium.grid for medium in self.media])


def pixel_values(patches: Tensor) -> Tensor:
    """Normalised as the towers' own image processors do it: [patches, 96] float32."""
    channels = patches.view(len(patches), 3, -1).long()
    return torch.stack([values[channels[:, index]] for index, values in enumerate(PIXEL_VALUES)], 1).flatten(1)


def prompt(config: VisionConfig, parts: Sequence[int | Medium], seed: int = 0) -> Prompt:
    """Media, and between them as many tokens of text as each number says."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(0, 90, part).tolist()
            continue
        apart = part.kind == "video" and config.steps_apart
        for step in range(part.grid[0] if apart else 1):
            tokens += [step, START, IMAGE if part.kind == "image" else VIDEO, END] if apart else [
                START, IMAGE if part.kind == "image" else VIDEO, END
            ]  # fmt: skip
    media = tuple(part for part in parts if isinstance(part, Medium))
    patches = [torch.from_numpy(rng.integers(0, 256, (np.prod(medium.grid), 96), dtype=np.uint8)) for medium in media]
    return Prompt(place_media(tokens, media, config), media, tuple(patches))


class Session:
    """One sequence with pictures in a paged cache whose blocks lie in no order."""

    def __init__(self, models: Models, prompt: Prompt, decoder: DecoderLM | None = None) -> None:
        self.prompt = prompt
        self.model = decoder or models.decoder
        self.seen = prompt.encode(models.tower) if prompt.media else None
        self.length = 0
        self.offsets = np.cumsum([0] + [models.vision_config.num_tokens(medium.grid) for medium in prompt.media])
        self.caches = allocate_kv_cache(self.model.config, 32, toy.BLOCK_SIZE, torch.float32, torch.device("cpu"), 1)
        for cache in self.caches:
            cache.values.fill_(float("nan"))
        self.table = list(range(32))[::-1]

    def chunk(self, length: int) -> tuple[list[int], np.ndarray, InputEmbeddings | None]:
        """Tokens, positions and embeddings of the next part of the prompt."""
        first, last = self.length, self.length + length
        rows, places = [], []
        for span in self.prompt.placement.spans:
            begin, end = max(span.start, first), min(span.start + span.length, last)
            rows += range(begin - first, end - first)
            start = self.offsets[span.medium] + span.offset - span.start
            places += range(start + begin, start + end)
        images = None
        if rows:
            images = InputEmbeddings(
                torch.tensor(rows), self.seen.embeddings[places], tuple(level[places] for level in self.seen.deepstack)
            )
        return (
            self.prompt.placement.tokens[first:last].tolist(),
            self.prompt.placement.positions[:, first:last],
            images,
        )

    def prefill(self, length: int) -> Tensor:
        """Logits of the next part of the prompt: [length, vocab]."""
        tokens, positions, images = self.chunk(length)
        return self.run(tokens, torch.from_numpy(positions.copy()), images)

    def decode(self, token: int) -> Tensor:
        return self.run([token], torch.tensor([self.length + self.prompt.placement.delta]), None)

    def run(self, tokens: list[int], positions: Tensor, images: InputEmbeddings | None) -> Tensor:
        batch = PagedBatch.build(
            [self.length], [len(tokens)], [self.table], block_size=toy.BLOCK_SIZE, device=torch.device("cpu")
        )
        self.length += len(tokens)
        ids = torch.tensor(tokens)
        return self.model.logits(self.model.forward(ids, batch, self.caches, positions=positions, images=images))
