"""From a WorkerConfig to a model in memory: checks first, then reads."""

import re
from collections.abc import Mapping
from contextlib import closing
from typing import Protocol

import torch

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.models.checkpoint_parts import decoder_part, tower_part
from dashinfer.models.config import ModelConfig
from dashinfer.models.decoder import DecoderLM
from dashinfer.models.gguf import GGUFFormat, GGUFSource
from dashinfer.models.linears import RoundedOnLoad, WeightFormat
from dashinfer.models.memory import check_memory, packed_bytes, weight_bytes
from dashinfer.models.parallel import Group
from dashinfer.models.quantization import rounding
from dashinfer.models.quantized_config import check_quant_type
from dashinfer.models.quantized_formats import checkpoint_format
from dashinfer.models.shapes import ALL, EMBEDDING, FINAL_NORM, HEAD, tensor_shapes
from dashinfer.models.split import check_split
from dashinfer.models.stage import Stage
from dashinfer.models.towers import Tower, load_tower
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_shapes import tower_bytes, tower_shapes
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
    stage: Stage = ALL,
    report: ReportProgress,
    vision: VisionConfig | None = None,
) -> tuple[DecoderLM, Tower | None]:
    """One rank's share of its stage of the model, on `device`, and the vision tower, of which each rank has the whole.

    A model that sees is not split into stages.

    Args:
        max_length: of the longest sequence, in tokens.
        free: bytes that the rank may take on the device.
        report: called with ("weights", bytes read, bytes in all, "B"), about a hundred times.
        vision: the tower's shape; None: the decoder alone is loaded.

    Raises:
        UnsupportedModel: the world size, the weights' format, type or shape, or a tensor is missing.
        ModelNotFound: a file is missing or damaged.
        InsufficientMemory: the weights do not fit.
        StartupError: the vision engine that is asked for cannot be used here.
    """
    model_config.check_world_size(group.world_size)
    model_config.check_stages(stage.count)
    if vision is not None:
        _check_vision(config, model_config, vision, stage)
    dtype = getattr(torch, config.data_type)
    on_cpu = device.type == "cpu"
    # a processor that cannot multiply the type keeps weights in another one: a layer of a single weight tells
    itemsize = pack_linear(torch.zeros(1, 1, dtype=dtype, device=device)).nbytes

    tower_needs = 0 if vision is None else tower_bytes(vision, itemsize)

    def needs(layer_bits: float | None = None, packed: Mapping[str, int] | None = None) -> int:
        copies = 2 if on_cpu else 1
        decoder = weight_bytes(
            model_config,
            itemsize,
            group.world_size,
            stage=stage,
            tied_copies=copies,
            layer_bits=layer_bits,
            packed=packed,
        )
        return decoder + tower_needs

    # where the checkpoint's own codes are kept, its files tell how much memory they need; else the config does, before
    source = None
    if config.files.format == "gguf" or model_config.quantization is not None:
        source = _source(config, model_config, stage)
    try:
        form, needed = _weight_format(config, model_config, source, needs, free, on_cpu=on_cpu)
        kind = config.data_type if form is None else config.quant_type or "the checkpoint's own type"
        check_memory(config.files.name, needed, free, kind, "memory" if on_cpu else "GPU memory")
    except BaseException:
        if source is not None:
            source.close()
        raise
    source = source or _source(config, model_config, stage)
    if vision is None:
        with WeightReader(source, dtype=dtype, device=device, report=report, format=form) as reader:
            _check_split(reader, model_config, group, stage)
            return DecoderLM(model_config, reader, group, max_length, stage), None
    with closing(source), closing(_tower_source(config, vision)) as tower_source:
        decoder_total, tower_total = (sum(each.sizes.values()) for each in (source, tower_source))

        def report_decoder(stage: str, done: int, total: int, unit: str) -> None:
            report(stage, done, decoder_total + tower_total, unit)

        def report_tower(stage: str, done: int, total: int, unit: str) -> None:
            report(stage, decoder_total + done, decoder_total + tower_total, unit)

        reader = WeightReader(source, dtype=dtype, device=device, report=report_decoder, format=form)
        _check_split(reader, model_config, group, stage)
        decoder = DecoderLM(model_config, reader, group, max_length)
        pixel_values = torch.frombuffer(bytearray(config.pixel_values), dtype=torch.float32).view(vision.channels, 256)
        tower = load_tower(
            config, vision, tower_source, pixel_values=pixel_values, device=device, dtype=dtype, report=report_tower
        )
        return decoder, tower


def _check_split(reader: WeightReader, model_config: ModelConfig, group: Group, stage: Stage) -> None:
    if reader.format is not None:
        check_split(reader.format, reader, model_config, group.world_size, stage)


def _check_vision(config: WorkerConfig, model_config: ModelConfig, vision: VisionConfig, stage: Stage) -> None:
    if stage.count > 1:
        raise UnsupportedModel(
            f"--pipeline-parallel {stage.count}: a model that sees cannot be split into stages; "
            "use --tensor-parallel, or --mode llm"
        )
    if config.files.format == "gguf":
        raise UnsupportedModel(f"{config.files.name}: a .gguf file has no vision tower that is supported; use --mode llm")
    if vision.out_hidden_size != model_config.hidden_size:
        raise UnsupportedModel(
            f"config.json: the vision tower's embeddings have the size {vision.out_hidden_size}, "
            f"and the decoder's {model_config.hidden_size}"
        )


class _Needs(Protocol):
    """Bytes of all weights: in the data type, with `layer_bits` a weight in layers, or with some matrices `packed`."""

    def __call__(self, layer_bits: float | None = None, packed: Mapping[str, int] | None = None) -> int: ...


def _weight_format(
    config: WorkerConfig, model_config: ModelConfig, source: Source | None, needs: _Needs, free: int, *, on_cpu: bool
) -> tuple[WeightFormat | None, int]:
    """How the checkpoint's linear layers are to be read, None for as they are, and the bytes that all weights need then.

    A .gguf file's own codes are kept, in 16-bit models and for `a16w4`. On CPU they are quicker for few rows and slower for
    many, so layers keep a 16-bit copy too if that leaves half of the memory free, and nothing but that where a row must have
    the same bits in any company.

    Raises:
        UnsupportedModel: `--quant-type` asks for what the checkpoint is not, or random weights for one that is quantised.
    """
    regroup = config.quant_group_size is not None or config.quantize_head
    check_quant_type(model_config.quantization, config.files.name, config.quant_type, regroup=regroup)
    if model_config.quantization is not None:
        if source is None or config.load_format == "dummy":
            raise UnsupportedModel(
                f"--load-format dummy: random weights are not quantised as {config.files.name} is; "
                "use the original model's config.json with --quant-type"
            )
        return checkpoint_format(model_config.quantization), needs(packed=packed_bytes(model_config, source.sizes))
    rounded, needed = None, needs()
    if config.quant_type is not None:
        settings = rounding(config.quant_type, config.quant_group_size)
        rounded = RoundedOnLoad(settings, quantizes_head=config.quantize_head)
        needed = needs(settings.bits_per_weight)
    if not isinstance(source, GGUFSource):
        return rounded, needed
    if config.quant_type == "a16w4":
        bits = source.bits_per_weight(on_cpu=on_cpu, kept=4, others=settings.bits_per_weight)
        return GGUFFormat(source, bits=4, others=rounded), needs(bits)
    if rounded is not None or config.data_type == "float32" or (on_cpu and config.deterministic):
        return rounded, needed
    own = needs(source.bits_per_weight(on_cpu=on_cpu))
    if on_cpu and needed + own < free // 2:
        # with the copies, formats of more bits gain nothing
        return GGUFFormat(source, bits=4, wide_copy=True), needed + own
    return GGUFFormat(source), own


def _source(config: WorkerConfig, model_config: ModelConfig, stage: Stage) -> Source:
    source = _open(config, model_config)
    if stage.count > 1:
        _forget_other_stages(source, model_config, stage)
    return source


def _forget_other_stages(source: Source, model_config: ModelConfig, stage: Stage) -> None:
    """Leave a source no tensors of layers, embedding, final norm and head but the stage's: nobody misses the others."""
    layers = {f"model.layers.{index}." for index in stage.layers(model_config.num_layers)}
    held = tensor_shapes(model_config, stage)
    others = tuple(name.removesuffix("weight") for name in (EMBEDDING, FINAL_NORM, HEAD) if name not in held)

    def is_held(name: str) -> bool:
        layer = re.match(r"model\.layers\.\d+\.", name)
        return layer[0] in layers if layer else not name.startswith(others)

    source.sizes = {name: size for name, size in source.sizes.items() if is_held(name)}


def _open(config: WorkerConfig, model_config: ModelConfig) -> Source:
    if config.load_format == "dummy":
        return DummySource(tensor_shapes(model_config))
    if not config.files.weights:
        raise ModelNotFound(f"{config.files.name} has no weight files; a model needs .safetensors files, or is a .gguf file")
    if config.files.format == "gguf":
        return GGUFSource(config.files.weights, head_dim=model_config.head_dim)
    source = SafetensorsSource(config.files.weights)
    return source if model_config.rope.mrope_section is None else decoder_part(source)


def _tower_source(config: WorkerConfig, vision: VisionConfig) -> Source:
    if config.load_format == "dummy":
        return DummySource(tower_shapes(vision))
    return tower_part(SafetensorsSource(config.files.weights))
