"""The vision engines against transformers, on the same tiny random weights, and which of them is taken."""

import hashlib
import sys
import threading
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dashinfer.errors import ConfigurationError, InsufficientMemory, StartupError, UnsupportedModel
from dashinfer.models import towers, vision_batches, vision_engines
from dashinfer.models.checkpoint_parts import tower_part
from dashinfer.models.towers import Tower, load_tower
from dashinfer.models.vision_batches import batches, buckets
from dashinfer.models.vision_engines import choose_vision_engine
from dashinfer.models.vision_onnx import tower_graph
from dashinfer.models.vision_qwen import VisionOutput
from dashinfer.models.vision_shapes import tower_shapes
from dashinfer.models.vision_tensorrt import load_tensorrt_tower
from dashinfer.models.weights import DummySource, SafetensorsSource

from . import toy, vision_toy
from .fake_tensorrt import FakeTensorRT, Stream
from .vision_toy import PIXEL_VALUES, Models

TOWER = pytest.mark.feature("Vision", "Tower in our own kernels or the model's")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = [
    [(1, 2, 2)],
    [(1, 18, 14)],
    [(1, 6, 10), (1, 4, 4), (3, 4, 6), (1, 14, 2), (1, 4, 4)],
]


@pytest.fixture(scope="module", params=vision_toy.FAMILIES)
def models(request, tmp_path_factory) -> Models:
    return vision_toy.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Models:
    return vision_toy.make("qwen2-vl", tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture
def trt(monkeypatch, tmp_path) -> FakeTensorRT:
    monkeypatch.setenv("DASHINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(towers, "choose_vision_engine", lambda requested, device: requested or "tensorrt")
    return FakeTensorRT().install(monkeypatch)


def load(
    models: Models, engine: str | None, dtype: torch.dtype = torch.float32, source: Any = None, device: torch.device = CPU
) -> Tower:
    files = toy.weight_files(models.folder)
    return load_tower(
        toy.worker_config(files, models.config, vision=True, vision_engine=engine),
        models.vision_config,
        source or tower_part(SafetensorsSource(files)),
        pixel_values=PIXEL_VALUES,
        device=device,
        dtype=dtype,
        report=lambda *_: None,
    )


def random_patches(grids: list[tuple[int, int, int]]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), 96), dtype=torch.uint8, generator=generator)


def drain(steps: Generator[None, None, VisionOutput]) -> tuple[VisionOutput, int]:
    """The output, and how often there was time for something else."""
    pauses = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value, pauses
        pauses += 1


def assert_equal(output: VisionOutput, models: Models, patches: torch.Tensor, grids: Any) -> None:
    with torch.inference_mode():
        expected = models.reference.model.visual(vision_toy.pixel_values(patches), torch.tensor(grids))
    levels = getattr(expected, "deepstack_features", None) or []
    assert len(output.deepstack) == len(levels) == len(models.vision_config.deepstack_blocks)
    for actual, right in zip((output.embeddings, *output.deepstack), (expected.pooler_output, *levels), strict=True):
        torch.testing.assert_close(actual, right, atol=5e-5, rtol=1e-5)
    assert expected.pooler_output.std() > 0.1, "embeddings that say nothing"


@pytest.mark.parametrize("engine", [pytest.param("native", marks=TOWER), pytest.param("transformers", marks=TOWER), "tensorrt"])
def test_engines_see_what_transformers_sees(models, engine, trt, monkeypatch):
    monkeypatch.setattr(vision_batches, "_LONGEST", (16, 40))  # the tensorrt engine runs five images in three buckets
    tower = load(models, engine)

    assert tower.engine == engine
    assert tower.weight_bytes >= models.tower.weight_bytes
    for grids in SIZES:
        patches = random_patches(grids)
        output, pauses = drain(tower.steps(patches, grids))

        assert_equal(output, models, patches, grids)
        assert pauses >= models.vision_config.depth - 1


def test_images_of_two_callers_in_turns(models, trt):
    """The tower is one, and a caller's steps may lie between another's."""
    grids = [[(1, 4, 6)], [(1, 8, 4), (1, 2, 2)]]
    asked = [random_patches(each) for each in grids]
    for engine in ("transformers", "tensorrt"):
        tower = load(models, engine)
        steps = [tower.steps(*each) for each in zip(asked, grids, strict=True)]
        for each in steps:
            next(each)

        for each, patches, grid in zip(steps, asked, grids, strict=True):
            assert_equal(drain(each)[0], models, patches, grid)


def encoding() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vision tower"]


def test_transformers_goes_on_only_while_its_caller_waits(qwen2):
    tower = load(qwen2, "transformers")
    seen = []
    tower._model.blocks[1].register_forward_hook(lambda *_: seen.append(threading.current_thread()))
    steps = tower.steps(random_patches([(1, 4, 4)]), [(1, 4, 4)])

    assert not encoding()
    counts = [len(seen) for _ in zip(range(3), steps, strict=False)]
    assert counts == [0, 0, 1]
    assert encoding() == seen

    steps.close()
    assert not encoding(), "an abandoned encode goes on"


def test_errors_of_transformers_reach_the_caller(qwen2):
    tower = load(qwen2, "transformers")

    with pytest.raises(RuntimeError):
        drain(tower.steps(random_patches([(1, 4, 4)]), [(1, 4, 6)]))
    assert not encoding()


def test_transformers_with_another_config(qwen2):
    settings = qwen2.config["vision_config"]
    other = Models(qwen2.family, None, qwen2.folder)
    other.__dict__["config"] = qwen2.config | {"vision_config": settings | {"mlp_ratio": 2}}
    other.__dict__["vision_config"] = qwen2.vision_config

    with pytest.raises(UnsupportedModel, match="size mismatch"):
        load(other, "transformers")


def test_transformers_in_half_precision(models):
    tower = load(models, "transformers", torch.bfloat16)
    patches = random_patches(SIZES[2])

    output, _ = drain(tower.steps(patches, SIZES[2]))

    exact = models.tower.encode(patches, SIZES[2])
    assert output.embeddings.dtype == torch.bfloat16
    assert (output.embeddings.float() - exact.embeddings).norm() < 0.05 * exact.embeddings.norm()


def test_a_plan_in_half_precision(models, trt):
    tower = load(models, "tensorrt", torch.float16)
    patches = random_patches(SIZES[2])

    output, _ = drain(tower.steps(patches, SIZES[2]))

    exact = models.tower.encode(patches, SIZES[2])
    for actual, right in zip((output.embeddings, *output.deepstack), (exact.embeddings, *exact.deepstack), strict=True):
        assert actual.dtype == torch.float16
        assert (actual.float() - right).norm() < 0.01 * right.norm()


def test_a_graph_of_bfloat16_is_well_typed(models, tmp_path):
    source = DummySource(tower_shapes(models.vision_config))

    def read(name, dtype):
        out = torch.empty(source.shape(name), dtype=dtype)
        source.read_into(out, SimpleNamespace(name=name))
        return out

    graph = tower_graph(models.vision_config, torch.bfloat16)
    graph.save(tmp_path / "tower.onnx", read)

    onnx.checker.check_model(str(tmp_path / "tower.onnx"), full_check=True)
    assert (tmp_path / "weights.bin").stat().st_size <= graph.nbytes


def test_a_plan_is_built_once_for_a_model_a_gpu_and_a_version(qwen2, trt, monkeypatch, tmp_path):
    load(qwen2, "tensorrt")
    load(qwen2, "tensorrt")
    assert trt.builds == 1

    trt.__version__ = "11.0"
    load(qwen2, "tensorrt")
    assert trt.builds == 2
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    load(qwen2, "tensorrt")
    assert trt.builds == 3
    load(qwen2, "tensorrt", torch.float16)
    assert trt.builds == 4
    load(qwen2, "tensorrt", source=DummySource(tower_shapes(qwen2.vision_config)))
    assert trt.builds == 5

    entries = list((tmp_path / "cache" / "vision").iterdir())
    assert len(entries) == 5
    assert {path.name for entry in entries for path in entry.iterdir()} == {"tower.plan", "tower.sha256"}


@pytest.mark.parametrize("damage", ["short", "refused"])
def test_a_damaged_plan_is_built_again(qwen2, trt, tmp_path, damage):
    load(qwen2, "tensorrt")
    [plan] = (tmp_path / "cache" / "vision").glob("*/tower.plan")
    whole = plan.read_bytes()
    if damage == "short":
        plan.write_bytes(whole[:1000])
    else:
        plan.write_bytes(b"a plan of another kind")
        (plan.parent / "tower.sha256").write_text(hashlib.sha256(plan.read_bytes()).hexdigest())

    tower = load(qwen2, "tensorrt")

    assert trt.builds == 2
    assert plan.read_bytes() == whole
    patches = random_patches(SIZES[0])
    assert_equal(drain(tower.steps(patches, SIZES[0]))[0], qwen2, patches, SIZES[0])


@pytest.mark.parametrize(("failure", "reason"), [("parse", "unknown operator"), ("build", "no kernel for this")])
def test_where_tensorrt_fails(qwen2, trt, failure, reason, caplog, tmp_path):
    trt.failure = failure
    with pytest.raises(StartupError, match=rf"TensorRT 10\.99 .*{reason}.*; use --vision-engine native"):
        load(qwen2, "tensorrt")

    tower = load(qwen2, None)

    assert tower.engine == "native"
    assert [record.levelname for record in caplog.records if "vision engine: native" in record.message] == ["WARNING"]
    assert list((tmp_path / "cache" / "vision").iterdir()) == []


def test_a_gpu_that_cannot_be_used(qwen2, trt):
    def builder(log):
        raise TypeError("factory function returned nullptr")

    trt.Builder = builder

    with pytest.raises(StartupError, match="returned nullptr"):
        load(qwen2, "tensorrt")


@pytest.mark.feature("Vision", "Tower in TensorRT")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensorrt_itself(models, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt")
    monkeypatch.setenv("DASHINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(vision_batches, "_LONGEST", (16, 40))
    tower = load(models, "tensorrt", torch.float16, device=GPU)
    patches = random_patches(SIZES[2])

    output, _ = drain(tower.steps(patches, SIZES[2]))

    exact = models.tower.encode(patches, SIZES[2])
    for actual, right in zip((output.embeddings, *output.deepstack), (exact.embeddings, *exact.deepstack), strict=True):
        assert (actual.cpu().float() - right).norm() < 0.02 * right.norm()


def test_an_abandoned_batch_ends_before_its_memory_is_free(qwen2, trt):
    steps = load(qwen2, "tensorrt").steps(random_patches(SIZES[0]), SIZES[0])
    next(steps)
    assert Stream.streams[-1].work

    steps.close()

    assert not Stream.streams[-1].work


def test_an_image_larger_than_the_plan(qwen2, trt):
    tower = load_tensorrt_tower(
        qwen2.vision_config,
        tower_part(SafetensorsSource(toy.weight_files(qwen2.folder))),
        pixel_values=PIXEL_VALUES,
        device=CPU,
        dtype=torch.float32,
        report=lambda *_: None,
        max_patches=64,
    )

    with pytest.raises(InsufficientMemory, match=r"80 patches is more than the 64 .*lower --max-pixels"):
        next(tower.steps(random_patches([(1, 8, 10)]), [(1, 8, 10)]))
    output, _ = drain(tower.steps(random_patches([(2, 8, 8)]), [(2, 8, 8)]))
    assert output.embeddings.isfinite().all()


def test_batches_keep_their_bounds(models):
    config, rng = models.vision_config, np.random.default_rng(0)
    bounds = buckets(config)
    assert [bucket.longest * bucket.sequences for bucket in bounds] == [65536] * 3
    small = [(2 * h, 2 * w) for h, w in rng.integers(1, 20, (400, 2)).tolist()]
    narrow = [(2, 400), (36, 1816), (256, 256), (180, 364), (40, 8), (200, 2)]
    steps = [*small, *narrow]

    found = list(batches(config, steps, bounds))

    assert sorted(step for batch in found for step in batch.steps) == list(range(len(steps)))
    for batch in found:
        bucket, shapes = bounds[batch.bucket], [steps[index] for index in batch.steps]
        assert bucket.shortest <= max(h * w for h, w in shapes) <= bucket.longest
        assert len(shapes) <= bucket.sequences
        layout = vision_batches.BatchLayout.build(config, shapes)
        assert layout.windows is None or len(layout.windows.places) <= bucket.windows
    assert len(found) < 20, "batches of few images"


def test_the_choice(monkeypatch, caplog):
    caplog.set_level("INFO")

    def choose(requested, device, *packages):
        caplog.clear()
        for package in ("transformers", "tensorrt", "onnx"):
            monkeypatch.setitem(sys.modules, package, SimpleNamespace() if package in packages else None)
        return choose_vision_engine(requested, device)

    assert choose(None, GPU, "tensorrt", "onnx") == "tensorrt"
    assert choose("tensorrt", GPU, "tensorrt", "onnx") == "tensorrt"
    assert choose("native", GPU, "tensorrt", "onnx") == "native"
    assert choose("transformers", CPU, "transformers") == "transformers"
    assert not caplog.records

    assert choose(None, CPU, "tensorrt", "onnx") == "native"
    assert caplog.messages == ["vision engine: native (TensorRT needs an NVIDIA GPU)"]
    for packages in ((), ("tensorrt",), ("onnx",)):
        assert choose(None, GPU, *packages) == "native"
        [message] = caplog.messages
        assert message.startswith("vision engine: native (the package ") and 'pip install "dashinfer[tensorrt]"' in message
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose(None, GPU, "tensorrt", "onnx") == "native"


@pytest.mark.parametrize(
    ("requested", "device", "advice"),
    [
        ("tensorrt", CPU, "TensorRT needs an NVIDIA GPU, or use --vision-engine native"),
        ("tensorrt", GPU, r'tensorrt cannot be imported.*pip install "dashinfer\[tensorrt\]"'),
        ("transformers", CPU, r'transformers cannot be imported.*pip install "dashinfer\[vlm\]"'),
    ],
)
def test_a_request_that_cannot_be_met(requested, device, advice, monkeypatch):
    for package in ("transformers", "tensorrt"):
        monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(ConfigurationError, match=f"--vision-engine {requested}: .*{advice}"):
        vision_engines.choose_vision_engine(requested, device)
