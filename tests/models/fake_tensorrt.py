"""TensorRT's Python API as far as it is used here, on CPU: plans are ONNX models that onnxruntime runs.

Profiles are held, activations' memory must be given, and nothing runs before somebody waits: a stream is a queue.
"""

import ctypes
import enum
import json
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

_MAGIC = b"fake plan\n"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}


class Stream:
    """Also what it records; work is done when an event has been asked for the third time, or is waited for."""

    streams: ClassVar[list["Stream"]] = []

    def __init__(self, device: Any = None) -> None:
        self.work: list[Any] = []
        self.cuda_stream = len(Stream.streams)
        self.asked = 0
        Stream.streams.append(self)

    def wait_stream(self, other: Any) -> None:
        pass

    def record_event(self) -> "Stream":
        self.asked = 0
        return self

    def query(self) -> bool:
        self.asked += 1
        if self.asked >= 3:
            self.synchronize()
        return not self.work

    def synchronize(self) -> None:
        for each in self.work:
            each()
        self.work.clear()


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        least, likeliest, greatest = shapes
        assert all(0 < a <= b <= c for a, b, c in zip(least, likeliest, greatest, strict=True)), (name, shapes)
        self.shapes[name] = shapes


class _Config:
    def __init__(self) -> None:
        self.profiles: list[_Profile] = []

    def set_preview_feature(self, feature: str, on: bool) -> None:
        assert feature == "activation resize" and on

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class FakeTensorRT(SimpleNamespace):
    """The module. `builds` counts plans; `failure` makes parsing or building fail."""

    ILogger = ILogger
    NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    PreviewFeature = SimpleNamespace(RUNTIME_ACTIVATION_RESIZE_10_10="activation resize")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self) -> None:
        super().__init__(__version__="10.99", builds=0, failure="")
        self.Builder = lambda log: _Builder(self, log)
        self.OnnxParser = lambda network, log: _Parser(self, network)
        self.Runtime = _Runtime

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeTensorRT":
        monkeypatch.setitem(sys.modules, "tensorrt", self)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        return self


class _Builder:
    def __init__(self, trt: FakeTensorRT, log: Any) -> None:
        self._trt, self._log = trt, log

    def create_network(self, flags: int) -> SimpleNamespace:
        assert flags == 1 << 1, "types are to be the graph's"
        return SimpleNamespace(model=None)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: SimpleNamespace, config: _Config) -> memoryview | None:
        if self._trt.failure == "build":
            self._log.log(ILogger.Severity.ERROR, "no kernel for this")
            return None
        assert all(profile.shapes.keys() == {each.name for each in network.model.graph.input} for profile in config.profiles)
        self._trt.builds += 1
        profiles = json.dumps([profile.shapes for profile in config.profiles]).encode()
        return memoryview(_MAGIC + profiles + b"\n" + network.model.SerializeToString())


class _Parser:
    num_errors = 1

    def __init__(self, trt: FakeTensorRT, network: SimpleNamespace) -> None:
        self._trt, self._network = trt, network

    def parse_from_file(self, path: str) -> bool:
        onnx.checker.check_model(path, full_check=True)
        self._network.model = onnx.load(path)
        return self._trt.failure != "parse"

    def get_error(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(desc=lambda: "unknown operator")


class _Runtime:
    def __init__(self, log: Any) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> "_Engine | None":
        return _Engine(plan) if plan.startswith(_MAGIC) else None


class _Engine:
    def __init__(self, plan: bytes) -> None:
        _, profiles, model = plan.split(b"\n", 2)
        self.profiles = json.loads(profiles)
        self.session = onnxruntime.InferenceSession(model)

    def create_execution_context(self, strategy: str) -> "_Context":
        assert strategy == "user managed"
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = self._engine.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, greatest = self._profile[name]
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self._shapes.keys() == self._profile.keys()
        return 4 * self._shapes["patches"][0]

    def set_device_memory(self, address: int, size: int) -> None:
        assert address
        self._memory = size

    def execute_async_v3(self, stream: int) -> bool:
        session, shapes, addresses = self._engine.session, dict(self._shapes), dict(self._addresses)
        assert self._memory == 4 * shapes["patches"][0]

        def run() -> None:
            inputs = {each.name: _at(addresses[each.name], shapes[each.name], each.type) for each in session.get_inputs()}
            names = [each.name for each in session.get_outputs()]
            for each, array in zip(session.get_outputs(), session.run(names, inputs), strict=True):
                _at(addresses[each.name], array.shape, each.type)[...] = array

        Stream.streams[stream].work.append(run)
        return True


def _at(address: int, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """The array that lies at an address."""
    dtype = np.dtype(_TYPES[kind])
    memory = (ctypes.c_byte * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape)
