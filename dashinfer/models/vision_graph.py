"""A vision tower that another library runs as a fixed graph: batches of steps in, embeddings out.

Prepares the inputs that `vision_onnx` names and puts the outputs in order; knows nothing of who runs the graph.
"""

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer.errors import InsufficientMemory
from dashinfer.models.vision_batches import BatchLayout, Bucket, Padded, Step, batches
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_pixels import PixelTable
from dashinfer.models.vision_qwen import VisionOutput
from dashinfer.types import VisionEngine


class Execution(Protocol):
    """A batch on its way."""

    def done(self) -> bool: ...

    def wait(self) -> None:
        """Until it is done."""
        ...


class Session(Protocol):
    """What runs the graph."""

    def start(self, bucket: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Execution:
        """Fills `outputs`. Tensors are on the session's device, in its current stream, and are kept until all is done."""
        ...


class GraphTower:
    """A vision tower.

    Attributes:
        engine: what `--vision-engine` calls it.
        weight_bytes: that it holds.
    """

    def __init__(
        self,
        config: VisionConfig,
        session: Session,
        bounds: Sequence[Bucket],
        *,
        engine: VisionEngine,
        weight_bytes: int,
        positions: Tensor | None,
        pixel_values: Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            bounds: of the batches that the session takes.
            positions: [positions, hidden] float32, the embeddings of places; None: the tower has none.
            pixel_values: [channels, 256] float32, what each byte of each channel becomes.
            dtype: of the graph's weights.
        """
        self.engine = engine
        self.weight_bytes = weight_bytes
        self._config, self._session, self._bounds = config, session, bounds
        self._device, self._dtype = device, dtype
        self._positions = positions
        self._pixels = PixelTable(pixel_values, device, dtype)
        axis = config.head_dim // 2
        self._frequencies = (1.0 / config.rope_theta ** (torch.arange(0, axis, 2, dtype=torch.float32) / axis)).to(device)

    @torch.inference_mode()
    def steps(self, patches: Tensor, grids: Sequence[Grid]) -> Generator[None, None, VisionOutput]:
        """Yields while a batch runs; returns the embeddings.

        Args:
            patches: [patches, patch_dim] uint8 on any device: of each image or video step by step, in a step by squares of
                merge_size * merge_size patches.
            grids: steps, rows and columns of patches of each image or video; at least one.

        Raises:
            InsufficientMemory: a step is longer than the graph was made for.
        """
        config = self._config
        shapes = [(height, width) for count, height, width in grids for _ in range(count)]
        lengths = [height * width for height, width in shapes]
        assert patches.shape == (sum(lengths), config.patch_dim) and patches.dtype == torch.uint8
        if max(lengths) > (most := self._bounds[-1].longest):
            raise InsufficientMemory(
                f"an image of {max(lengths)} patches is more than the {most} that --vision-engine {self.engine} is built for; "
                "lower --max-pixels, or use --vision-engine native"
            )
        pieces = patches.to(self._device, non_blocking=True).split(lengths)
        squares = config.merge_size**2
        levels = 1 + len(config.deepstack_blocks)
        found: list[tuple[Tensor, ...]] = [()] * len(shapes)
        for batch in batches(config, shapes, self._bounds):
            inputs = self._inputs([pieces[step] for step in batch.steps], [shapes[step] for step in batch.steps])
            tokens = [lengths[step] // squares for step in batch.steps]
            outputs = [
                torch.empty(sum(tokens), config.out_hidden_size, dtype=self._dtype, device=self._device) for _ in range(levels)
            ]
            names = ("embeddings", *(f"deepstack_{level}" for level in range(levels - 1)))
            execution = self._session.start(batch.bucket, inputs, dict(zip(names, outputs, strict=True)))
            try:
                yield
                while not execution.done():
                    yield
            finally:
                execution.wait()  # an abandoned batch still writes to these tensors
            for step, *values in zip(batch.steps, *(output.split(tokens) for output in outputs), strict=True):
                found[step] = tuple(values)
        embeddings, *deepstack = (torch.cat(values) for values in zip(*found, strict=True))
        return VisionOutput(embeddings, tuple(deepstack))

    def _inputs(self, pieces: list[Tensor], shapes: list[Step]) -> dict[str, Tensor]:
        config = self._config
        layout = BatchLayout.build(config, shapes)
        inputs = {"patches": self._pixels(torch.cat(pieces))}
        places = (self._upload(each).float()[:, None] for each in (layout.plain.rows, layout.plain.columns))
        angles = torch.cat([each * self._frequencies for each in places], 1)
        inputs |= {"cos": angles.cos(), "sin": angles.sin()}
        if self._positions is not None and config.positions_side is not None:
            indices, shares = map(self._upload, layout.plain.position_weights(config.positions_side))
            inputs["positions"] = F.embedding_bag(indices, self._positions, per_sample_weights=shares, mode="sum")
        inputs |= self._rows("steps", layout.steps)
        return inputs if layout.windows is None else inputs | self._rows("windows", layout.windows)

    def _rows(self, name: str, padded: Padded) -> dict[str, Tensor]:
        mask = self._upload(padded.mask).to(self._dtype)
        return {name: self._upload(padded.places), f"{name}_mask": mask, f"{name}_back": self._upload(padded.back)}

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # a copy from other memory would wait for whatever the device does
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
