"""The vision tower as transformers has it, with the checkpoint's weights: no remote code, no files but safetensors.

Its forward pass is one call. It runs in a thread of its own that goes on only while the caller waits for it, and stops before
each block, so that the caller can do something else in between.
"""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dashinfer.errors import UnsupportedModel
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_pixels import PixelTable
from dashinfer.models.vision_qwen import VisionOutput
from dashinfer.models.vision_shapes import tower_shapes
from dashinfer.models.weights import Part, WeightReader
from dashinfer.types import VisionEngine

_Result = TypeVar("_Result")
_CLASSES = {
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel"),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
    ),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
}


class TransformersTower:
    """A vision tower.

    Attributes:
        weight_bytes: that it holds.
    """

    engine: VisionEngine = "transformers"

    def __init__(self, config: VisionConfig, settings: Mapping[str, Any], reader: WeightReader, pixel_values: Tensor) -> None:
        """Reads the tensors of `tower_shapes`.

        Args:
            settings: the `vision_config` of the checkpoint's config.json.
            pixel_values: [channels, 256] float32, what each byte of each channel becomes by rescaling and normalisation.

        Raises:
            UnsupportedModel: a tensor is missing, has an unexpected shape or type, or is one too many, or transformers makes
                another tower of `settings`.
        """
        self._device = reader.device
        self._model = _empty_model(config, settings, reader.device, reader.dtype)
        weights = {name.removeprefix("visual."): reader.read(Part(name, shape)) for name, shape in tower_shapes(config).items()}
        reader.finish(config.depth)
        try:
            self._model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UnsupportedModel(
                f"transformers makes another vision tower of config.json than its weights: {error}"
            ) from None
        self.weight_bytes = sum(weight.nbytes for weight in weights.values())
        self._thread = threading.local()  # `pause` of the encode that runs in it
        for block in self._model.blocks:
            block.register_forward_pre_hook(lambda *_: self._thread.pause())
        self._pixels = PixelTable(pixel_values, reader.device, reader.dtype)

    def steps(self, patches: Tensor, grids: Sequence[Grid]) -> Generator[None, None, VisionOutput]:
        """Yields before each block, so that the caller can run something else in between; returns the embeddings.

        Args:
            patches: [patches, patch_dim] uint8 on any device: of each image or video step by step, in a step by squares of
                merge_size * merge_size patches.
            grids: steps, rows and columns of patches of each image or video; at least one.
        """
        assert patches.dtype == torch.uint8
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.current_stream(self._device)) if on_gpu else nullcontext()

        def encode(pause: Callable[[], None]) -> VisionOutput:
            with stream:  # a thread begins with the default one
                return self._encode(patches, grids, pause)

        return _in_turns(encode)

    @torch.inference_mode()
    def _encode(self, patches: Tensor, grids: Sequence[Grid], pause: Callable[[], None]) -> VisionOutput:
        pixels = self._pixels(patches.to(self._device))
        self._thread.pause = pause
        output = self._model(pixels, torch.tensor(grids, device=self._device))
        return VisionOutput(output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))


class _WithoutDrawing(TorchFunctionMode):
    """Parameters keep what is in their memory, where layers would fill them with random numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _empty_model(config: VisionConfig, settings: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    family, config_class, model_class = _CLASSES[config.architecture]
    package = f"transformers.models.{family}"
    hf_config = getattr(import_module(f"{package}.configuration_{family}"), config_class)(**settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), _WithoutDrawing():
            model = getattr(import_module(f"{package}.modeling_{family}"), model_class)(hf_config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


class _Abandoned(BaseException):
    """Nobody waits for the result."""


def _in_turns(work: Callable[[Callable[[], None]], _Result]) -> Generator[None, None, _Result]:
    """Runs `work` in a thread, in turns with the caller: yields where it calls the function that it is given."""
    ours, theirs = threading.Semaphore(0), threading.Semaphore(0)
    ended: list[tuple[_Result | None, BaseException | None]] = []
    abandoned = False

    def pause() -> None:
        ours.release()
        theirs.acquire()
        if abandoned:
            raise _Abandoned

    def run() -> None:
        theirs.acquire()
        try:
            ended.append((work(pause), None))
        except BaseException as error:
            ended.append((None, error))
        ours.release()

    thread = threading.Thread(target=run, name="vision tower", daemon=True)
    thread.start()
    try:
        while True:
            theirs.release()
            ours.acquire()
            if ended:
                break
            yield
    except GeneratorExit:
        abandoned = True
        theirs.release()
        thread.join()
        raise
    thread.join()
    result, error = ended[0]
    if error is not None:
        raise error
    return result
