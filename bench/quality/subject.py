"""Models to compare: one checkpoint in several quantisations, each loaded as a server's rank loads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer.models.loader import load_model
from dashinfer.models.parallel import Group
from dashinfer.sources.resolve import resolve
from dashinfer.types import DataType, ModelFiles, QuantType, WorkerConfig
from dashinfer.worker.runner import BLOCK_SIZE, select_device
from dashinfer_kernels import PagedBatch

# Shapes of a family each, for random weights: what is measured is the code, since such a model knows no language.
TINY: dict[str, dict[str, Any]] = {
    architecture: {
        "architectures": [architecture],
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    }
    | own
    for architecture, own in {
        "LlamaForCausalLM": {},
        "MistralForCausalLM": {"sliding_window": 100},  # shorter than the windows of tokens
        "Qwen2ForCausalLM": {},
        "Qwen3ForCausalLM": {},
    }.items()
}


@dataclass(frozen=True)
class Mode:
    """A way to quantise; `quant_type` None: the checkpoint in 16 bits."""

    name: str
    quant_type: QuantType | None = None
    group_size: int | None = None


MODES = {
    mode.name: mode
    for mode in (
        Mode("a16w8", "a16w8"),
        Mode("a16w8-g32", "a16w8", 32),
        Mode("a16w4", "a16w4"),
        Mode("a16w4-g64", "a16w4", 64),
        Mode("a16w4-g32", "a16w4", 32),
        Mode("a8w8", "a8w8"),
        Mode("fp8", "fp8"),
    )
}


def find_files(model: str) -> tuple[ModelFiles, Path | None]:
    """A checkpoint's files and its tokeniser; those of a family's tiny random model have no tokeniser."""
    if model in TINY:
        return ModelFiles(model, "safetensors", (), TINY[model]), None
    source = resolve(model)
    return source.files, source.tokenizer.tokenizer_json


class Subject:
    """A loaded model that gives the logits of whole windows."""

    def __init__(self, files: ModelFiles, mode: Mode, *, data_type: DataType, device: str, length: int) -> None:
        config = ModelConfig.from_hf(files.config)
        place = select_device(device)
        # a .gguf file's own codes would serve few rows, and what is measured is what the mode makes of its values
        plain = mode.quant_type is None and files.format == "gguf"
        worker = WorkerConfig(
            rank=0,
            world_size=1,
            files=files,
            device=device,
            data_type=data_type,
            load_format="auto" if files.weights else "dummy",
            max_batch=1,
            max_length=length,
            max_step_tokens=None,
            block_size=None,
            kv_cache_memory=None,
            deterministic=plain,
            quant_type=mode.quant_type,
            quant_group_size=mode.group_size,
        )
        self.mode, self._device, self._block_size = mode, place, BLOCK_SIZE[place.type]
        self.model, _ = load_model(
            worker, config, max_length=length, device=place, free=1 << 60, group=Group(), report=lambda *_: None
        )
        self._table = list(range(-(-length // self._block_size)))
        dtype = getattr(torch, data_type)
        self._caches = allocate_kv_cache(config, len(self._table), self._block_size, dtype, place, 1)

    @torch.inference_mode()
    def logits(self, window: Tensor) -> Tensor:
        """[length] tokens -> [length, vocabulary] float32."""
        batch = PagedBatch.build([0], [len(window)], [self._table], block_size=self._block_size, device=self._device)
        return self.model.logits(self.model.forward(window.to(self._device), batch, self._caches))
