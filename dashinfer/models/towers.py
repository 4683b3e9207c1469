"""The vision tower of a checkpoint, run by the engine that is asked for."""

from collections.abc import Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dashinfer.errors import ConfigurationError
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_qwen import VisionOutput, VisionTower
from dashinfer.models.weights import ReportProgress, Source, WeightReader
from dashinfer.types import VisionEngine, WorkerConfig


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
    """The tower that `config.vision_engine` asks for.

    Args:
        source: of the tower's tensors alone, `visual...`; may be read more than once, and is closed by the caller.
        pixel_values: [channels, 256] float32, what each byte of each channel of a patch stands for.
        dtype: of the weights and of the embeddings.
        report: as of `load_model`, with bytes of the tower alone.

    Raises:
        StartupError: that engine cannot be used here.
        UnsupportedModel: a tensor is missing, has an unexpected shape or type, or is one too many.
    """
    if config.vision_engine not in (None, "native"):
        raise ConfigurationError(f"--vision-engine {config.vision_engine} is not supported yet; use --vision-engine native")
    return VisionTower(vision, WeightReader(source, dtype=dtype, device=device, report=report), pixel_values)
