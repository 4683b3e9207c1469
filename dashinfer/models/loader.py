"""From a WorkerConfig to a model in memory: checks first, then reads."""

from collections.abc import Mapping

import torch

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.decoder import DecoderLM
from dashinfer.models.gguf import GGUFSource
from dashinfer.models.linears import RoundedOnLoad, WeightFormat
from dashinfer.models.memory import check_memory, packed_bytes, weight_bytes
from dashinfer.models.parallel import Group
from dashinfer.models.quantization import rounding
from dashinfer.models.quantized_config import check_quant_type
from dashinfer.models.quantized_formats import checkpoint_format
from dashinfer.models.shapes import tensor_shapes
from dashinfer.models.weights import DummySource, ReportProgress, SafetensorsSource, Source, WeightReader
from dashinfer.types import WorkerConfig
from dashinfer_kernels import pack_linear


def load_model(
    config: WorkerConfig,
    model_config: ModelConfig,
    *,
    max_length: int,
    device: torch.device,
    free: int,
    group: Group,
    report: ReportProgress,
) -> DecoderLM:
    """One rank's share of the model, on `device`.

    Args:
        max_length: of the longest sequence, in tokens.
        free: bytes that the rank may take on the device.
        report: called with ("weights", bytes read, bytes in all, "B"), about a hundred times.

    Raises:
        UnsupportedModel: the world size, the weights' format, type or shape, or a tensor is missing.
        ModelNotFound: a file is missing or damaged.
        InsufficientMemory: the weights do not fit.
    """
    model_config.check_world_size(group.world_size)
    dtype = getattr(torch, config.data_type)
    on_cpu = device.type == "cpu"
    # a processor that cannot multiply the type keeps weights in another one: a layer of a single weight tells
    itemsize = pack_linear(torch.zeros(1, 1, dtype=dtype, device=device)).nbytes

    def check(packed: Mapping[str, int]) -> None:
        needed = weight_bytes(model_config, itemsize, group.world_size, tied_copies=2 if on_cpu else 1, packed=packed)
        check_memory(config.files.name, needed, free, config.data_type, "memory" if on_cpu else "GPU memory")

    form = weight_format(config, model_config)
    if model_config.quantization is None:
        check({})
    source = _source(config, model_config)
    with WeightReader(source, dtype=dtype, device=device, report=report, format=form) as reader:
        if model_config.quantization is not None:
            check(packed_bytes(model_config, source.sizes))
        return DecoderLM(model_config, reader, group, max_length)


def weight_format(config: WorkerConfig, model_config: ModelConfig) -> WeightFormat | None:
    """How the checkpoint's linear layers are to be read; None: as they are.

    Raises:
        UnsupportedModel: `--quant-type` asks for what the checkpoint is not, or random weights for one that is quantised.
    """
    regroup = config.quant_group_size is not None or config.quantize_head
    check_quant_type(model_config.quantization, config.files.name, config.quant_type, regroup=regroup)
    if model_config.quantization is not None:
        if config.load_format == "dummy":
            raise UnsupportedModel(
                f"--load-format dummy: random weights are not quantised as {config.files.name} is; "
                "use the original model's config.json with --quant-type"
            )
        return checkpoint_format(model_config.quantization)
    if config.quant_type is None:
        return None
    return RoundedOnLoad(rounding(config.quant_type, config.quant_group_size))


def _source(config: WorkerConfig, model_config: ModelConfig) -> Source:
    if config.load_format == "dummy":
        return DummySource(tensor_shapes(model_config))
    if not config.files.weights:
        raise ModelNotFound(f"{config.files.name} has no weight files; a model needs .safetensors files, or is a .gguf file")
    if config.files.format == "gguf":
        return GGUFSource(config.files.weights, head_dim=model_config.head_dim)
    return SafetensorsSource(config.files.weights)
