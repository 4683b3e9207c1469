"""The vision towers on the Triton path, against the CPU path on the same weights."""

from typing import Any

import pytest
import torch

from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_qwen import VisionOutput, VisionTower
from dashinfer.models.vision_shapes import tower_shapes
from dashinfer.models.weights import DummySource, WeightReader
from dashinfer_kernels import dispatch

pytestmark = pytest.mark.feature("Vision", "Tower in our own kernels or the model's")

SIZES = {"depth": 2, "num_heads": 2, "patch_size": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 48, "hidden_size": 40},
    "Qwen2_5_VL": {
        "hidden_size": 48,
        "intermediate_size": 52,
        "out_hidden_size": 40,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "Qwen3VL": {
        "hidden_size": 48,
        "intermediate_size": 56,
        "out_hidden_size": 40,
        "num_position_embeddings": 9,
        "deepstack_visual_indexes": [1],
    },
}


def encode(config: VisionConfig, device: str) -> VisionOutput:
    source = DummySource(tower_shapes(config))
    with WeightReader(source, dtype=torch.float32, device=torch.device(device), report=lambda *_: None) as reader:
        tower = VisionTower(config, reader, torch.linspace(-2, 2, 256).expand(3, -1))
    patches = torch.randint(0, 256, (60 + 48, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return tower.encode(patches, [(1, 6, 10), (2, 4, 6)])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_triton_path_sees_what_the_cpu_path_sees(family: str, triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = {"architectures": [f"{family}ForConditionalGeneration"], "vision_config": SIZES | CONFIGS[family]}
    config = VisionConfig.from_hf(hf)
    actual = encode(config, triton_path)

    monkeypatch.setattr(dispatch, "interpreting", False)
    expected = encode(config, "cpu")

    assert len(actual.deepstack) == len(expected.deepstack) == len(config.deepstack_blocks)
    for got, right in zip((actual.embeddings, *actual.deepstack), (expected.embeddings, *expected.deepstack), strict=True):
        assert right.std() > 1e-4
        assert (got.cpu() - right).norm() < 1e-4 * right.norm()
