"""The vision tower of a checkpoint, run by the engine that is asked for; every rank has all of it, and encodes by itself."""

import logging
from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dashinfer.errors import StartupError
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_engines import choose_vision_engine
from dashinfer.models.vision_qwen import VisionOutput, VisionTower
from dashinfer.models.vision_transformers import TransformersTower
from dashinfer.models.weights import ReportProgress, Source, WeightReader
from dashinfer.types import VisionEngine, WorkerConfig

logger = logging.getLogger("dashinfer.models")


class Tower(Protocol):
    """A vision tower, loaded: of what engine, and the bytes that its weights take on the device."""

    @property
    def engine(self) -> VisionEngine: ...

    @property
    def weight_bytes(self) -> int: ...

    def steps(self, patches: Tensor, grids: Sequence[Grid]) -> Generator[None, None, VisionOutput]:
        """Yields between pieces of work, after each of which the caller may do something else; returns the embeddings.

        Args:
            patches: [patches, patch_dim] uint8 in host memory, of all images and videos one after the other.
            grids: of each image or video; at least one.
        """
        ...


def load_tower(
    config: WorkerConfig,
    vision: VisionConfig,
    source: Source,
    *,
    pixel_values: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    report: ReportProgress,
) -> Tower:
    """The tower, run by what `config.vision_engine` asks for. Where nothing is and TensorRT fails: a warning, and native.

    Args:
        source: of the tower's tensors alone, `visual...`; may be read more than once, and is closed by the caller.
        pixel_values: [channels, 256] float32, what each byte of each channel of a patch stands for.
        dtype: of the weights and of the embeddings.
        report: as of `load_model`, with bytes of the tower alone.

    Raises:
        ConfigurationError: that engine cannot be used here.
        StartupError: it fails.
        UnsupportedModel: a tensor is missing, has an unexpected shape or type, or is one too many.
    """
    engine = choose_vision_engine(config.vision_engine, device)
    if engine == "tensorrt":
        from dashinfer.models.vision_tensorrt import load_tensorrt_tower

        try:
            return load_tensorrt_tower(vision, source, pixel_values=pixel_values, device=device, dtype=dtype, report=report)
        except StartupError as error:
            if config.vision_engine is not None:
                raise
            logger.warning("vision engine: native, since TensorRT failed: %s", error)
    reader = WeightReader(source, dtype=dtype, device=device, report=report)
    if engine == "transformers":
        return TransformersTower(vision, config.files.config.get("vision_config") or {}, reader, pixel_values)
    return VisionTower(vision, reader, pixel_values)
