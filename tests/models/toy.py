"""Tiny random models made with transformers, and what it takes to run ours on the same weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.models.decoder import DecoderLM
from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer.models.loader import load_model
from dashinfer.models.parallel import Group
from dashinfer.types import DataType, ModelFiles, WorkerConfig
from dashinfer_kernels import PagedBatch

BLOCK_SIZE = 16
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def worker_config(
    weights: tuple[str, ...],
    config: dict[str, Any],
    *,
    format: str = "safetensors",
    data_type: DataType = "float32",
    load_format: str = "auto",
    max_length: int | None = None,
    **settings: Any,
) -> WorkerConfig:
    return WorkerConfig(
        rank=0,
        world_size=1,
        files=ModelFiles(name="toy", format=format, weights=weights, config=config),
        device="cpu",
        data_type=data_type,
        load_format=load_format,
        max_batch=4,
        max_length=max_length,
        max_step_tokens=None,
        block_size=BLOCK_SIZE,
        kv_cache_memory=None,
        **settings,
    )


def load(config: WorkerConfig, group: Group | None = None, report=lambda *_: None, free: int = 1 << 40) -> DecoderLM:
    model_config = ModelConfig.from_hf(config.files.config)
    max_length = model_config.resolve_max_length(config.max_length)
    group = group or Group()
    decoder, _ = load_model(
        config, model_config, max_length=max_length, device=torch.device("cpu"), free=free, group=group, report=report
    )
    return decoder


def hf_model(architecture: str, **settings: Any) -> Any:
    """A transformers model with random weights; biases and norms too, which its own initialisation leaves at 0 and 1."""
    import transformers

    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))(**(SIZES | settings))
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.1 if weight.ndim == 1 else 0.2)
    model.tie_weights()
    return model


def weight_files(folder: Path) -> tuple[str, ...]:
    return tuple(str(path) for path in sorted(folder.glob("*.safetensors")))


class Session:
    """One sequence in a paged cache whose blocks lie in no order."""

    def __init__(self, model: DecoderLM, max_length: int, world_size: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.length = 0
        blocks = -(-max_length // BLOCK_SIZE) + 2
        self.caches = allocate_kv_cache(
            model.config, blocks, BLOCK_SIZE, dtype, torch.device("cpu"), world_size, model.group.rank
        )
        for cache in self.caches:
            for part in (cache.values, cache.scales):
                if part is not None and part.dtype != torch.int8:
                    part.fill_(float("nan"))
        self.table = list(range(blocks))[::-1]

    def run(self, tokens: list[int]) -> Tensor:
        """Logits of the next positions: [len(tokens), vocab]."""
        batch = PagedBatch.build([self.length], [len(tokens)], [self.table], block_size=BLOCK_SIZE, device=torch.device("cpu"))
        self.length += len(tokens)
        return self.model.logits(self.model.forward(torch.tensor(tokens), batch, self.caches))
