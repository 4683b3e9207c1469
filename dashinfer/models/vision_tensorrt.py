"""A vision tower as a TensorRT plan: built once for a model, GPU and version, kept in the user's cache, run beside decoding.

The plan has a profile for each bucket of batches. Networks are strongly typed, so that types are those of the graph. Memory for
activations comes from torch, for the shapes of each batch. Only `load_tensorrt_tower` imports TensorRT.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashinfer.errors import StartupError
from dashinfer.models.vision_batches import MAX_PATCHES, Bucket, buckets
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_graph import GraphTower
from dashinfer.models.vision_onnx import ReadTensor, TowerGraph, tower_graph
from dashinfer.models.vision_shapes import POSITIONS, tower_shapes
from dashinfer.models.weights import Part, ReportProgress, Source, WeightReader
from dashinfer.sources.cache import cache_directory, new_entry

logger = logging.getLogger("dashinfer.models")

_PLAN, _DIGEST = "tower.plan", "tower.sha256"
Shape = tuple[int, ...]


def load_tensorrt_tower(
    config: VisionConfig,
    source: Source,
    *,
    pixel_values: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    report: ReportProgress,
    max_patches: int = MAX_PATCHES,
) -> GraphTower:
    """The tower, its plan read from the cache or built, which takes minutes.

    Args:
        source: of the tower's tensors alone.
        pixel_values: [channels, 256] float32, what each byte of each channel becomes by rescaling and normalisation.
        max_patches: of a step in time, before merging.

    Raises:
        UnsupportedModel: a tensor is missing, has an unexpected shape or type, or is one too many.
        ConfigurationError: the cache cannot be written to.
        StartupError: TensorRT cannot build or load the tower.
    """
    import tensorrt as trt

    shapes = tower_shapes(config)
    reader = WeightReader(source, dtype=dtype, device=torch.device("cpu"), report=report)

    def read(name: str, dtype: torch.dtype) -> Tensor:
        return reader.read(Part(name, shapes[name]), dtype=dtype)

    graph, bounds = tower_graph(config, dtype), buckets(config, max_patches)
    positions = None if config.positions_side is None else read(POSITIONS, torch.float32).to(device)
    weights = hashlib.sha256()
    for _, data in graph.tensors(read):
        weights.update(data)
    reader.finish(config.depth)

    engines = _Engines(trt)
    made_of = (graph.model.SerializeToString(), weights.digest(), bounds, *_made_for(trt, device))
    entry = cache_directory() / "vision" / hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]
    try:
        engine = engines.load(entry)
        if engine is None:
            shutil.rmtree(entry, ignore_errors=True)
            logger.info("building the vision tower with TensorRT, once for this model, GPU and version: it takes minutes")
            _build(engines, graph, read, config, bounds, entry)
            engine = engines.load(entry)
        if engine is None:
            raise StartupError(f"{engines.name} cannot load the vision tower that it built{engines.why()}")
        session = PlanSession(engines, engine, len(bounds), device)
    except (RuntimeError, TypeError, MemoryError) as error:  # what its bindings raise
        raise StartupError(f"{engines.name} fails: {error}{engines.why()}; use --vision-engine native") from error
    return GraphTower(
        config,
        session,
        bounds,
        engine="tensorrt",
        weight_bytes=graph.nbytes + (0 if positions is None else positions.nbytes),
        positions=positions,
        pixel_values=pixel_values,
        device=device,
        dtype=dtype,
    )


def _made_for(trt: Any, device: torch.device) -> tuple[Any, ...]:
    return trt.__version__, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def profile(graph: TowerGraph, config: VisionConfig, bucket: Bucket) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Of each input the least, the likeliest and the greatest shape in batches of a bucket."""
    likely = bucket.longest if bucket.sequences > 1 else min(bucket.longest, 4 * bucket.shortest)
    sequences = max(1, bucket.sequences // 8)
    sizes = {
        "patches": (bucket.shortest, sequences * likely, bucket.sequences * bucket.longest),
        "longest": (bucket.shortest, likely, bucket.longest),
        "sequences": (1, sequences, bucket.sequences),
    }
    if config.window is not None:
        whole = -(-sequences * likely // (config.window * config.merge_size) ** 2)
        sizes["windows"] = (1, min(whole, bucket.windows), bucket.windows)
    found = {}
    for each in graph.model.graph.input:
        dims = [sizes.get(dim.dim_param, (dim.dim_value,) * 3) for dim in each.type.tensor_type.shape.dim]
        least, likeliest, greatest = zip(*dims, strict=True)
        found[each.name] = (least, likeliest, greatest)
    return found


def _build(
    engines: "_Engines", graph: TowerGraph, read: ReadTensor, config: VisionConfig, bounds: Sequence[Bucket], entry: Path
) -> None:
    """Writes a plan and its digest to the new folder `entry`."""
    with new_entry(entry) as folder:
        exported = folder / "onnx"
        exported.mkdir()
        graph.save(exported / "tower.onnx", read)
        plan = engines.build(exported / "tower.onnx", [profile(graph, config, bucket) for bucket in bounds])
        shutil.rmtree(exported)
        (folder / _PLAN).write_bytes(plan)
        (folder / _DIGEST).write_text(hashlib.sha256(plan).hexdigest())


class _Engines:
    """TensorRT's builder and runtime."""

    def __init__(self, trt: Any) -> None:
        self.name = f"TensorRT {trt.__version__}"
        self.trt = trt
        self._log = _log(trt)
        self._runtime: Any = None

    def why(self) -> str:
        """What TensorRT said last."""
        return f": {self._log.last_error}" if self._log.last_error else ""

    def load(self, entry: Path) -> Any:
        """The engine of a plan; None where there is none, or a damaged one."""
        try:
            plan, digest = (entry / _PLAN).read_bytes(), (entry / _DIGEST).read_text()
        except FileNotFoundError:
            return None
        if hashlib.sha256(plan).hexdigest() != digest:
            logger.warning("%s is damaged", entry / _PLAN)
            return None
        self._runtime = self.trt.Runtime(self._log)
        return self._runtime.deserialize_cuda_engine(plan)

    def build(self, path: Path, profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]]) -> Any:
        """A plan, as a buffer, of the graph in a file.

        Raises:
            StartupError: TensorRT does not understand the graph, or has not what it takes to run it.
        """
        trt = self.trt
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(path)):
            errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise StartupError(f"{self.name} does not understand the vision tower: {errors}; use --vision-engine native")
        config = builder.create_builder_config()
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
        for shapes in profiles:
            profile = builder.create_optimization_profile()
            for name, (least, likeliest, greatest) in shapes.items():
                profile.set_shape(name, least, likeliest, greatest)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise StartupError(f"{self.name} cannot build the vision tower{self.why()}; use --vision-engine native")
        return plan


def _log(trt: Any) -> Any:
    """A logger for TensorRT; `last_error` is the last one."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            bad = severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            if bad:
                self.last_error = message
            logger.log(logging.WARNING if bad else logging.DEBUG, "TensorRT: %s", message)

    return Log()


class PlanSession:
    """Runs an engine in a stream of its own, so that decoding goes on meanwhile."""

    def __init__(self, engines: "_Engines", engine: Any, num_profiles: int, device: torch.device) -> None:
        self._device = device
        self._kept = engines, engine  # contexts need them as long as they live
        self._stream = torch.cuda.Stream(device)
        self._contexts = []
        for index in range(num_profiles):
            context = engine.create_execution_context(engines.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(index, self._stream.cuda_stream):
                raise RuntimeError("no execution context")
            self._contexts.append(context)
        self._stream.synchronize()

    def start(self, bucket: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> "_Running":
        """See `vision_graph.Session`. Raises RuntimeError where TensorRT refuses a batch."""
        context = self._contexts[bucket]
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"TensorRT refuses {name} of the shape {tuple(tensor.shape)}")
        for name, tensor in (*inputs.items(), *outputs.items()):
            assert tensor.is_contiguous()
            context.set_tensor_address(name, tensor.data_ptr())
        size = context.update_device_memory_size_for_shapes()
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        context.set_device_memory(memory.data_ptr(), size)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT cannot run the vision tower")
        return _Running(self._stream.record_event(), (inputs, outputs, memory))


class _Running:
    """What a batch uses is kept until it is done."""

    def __init__(self, event: torch.cuda.Event, used: tuple[Any, ...]) -> None:
        self._event, self._used = event, used

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()
