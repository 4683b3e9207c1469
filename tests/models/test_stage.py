"""Stages of a pipeline: what each holds, and that together they are the model."""

from itertools import combinations, pairwise

import pytest
import torch

from dashinfer.errors import UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.decoder import DecoderLM
from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer.models.loader import load_model
from dashinfer.models.memory import weight_bytes
from dashinfer.models.parallel import Group
from dashinfer.models.shapes import HEAD, head_cost
from dashinfer.models.stage import Stage, deal_layers
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.weights import DummySource
from dashinfer.types import WorkerConfig
from dashinfer_kernels import PagedBatch
from tests.models import toy

LLAMA = toy.SIZES | {"architectures": ["LlamaForCausalLM"]}
TIED = LLAMA | {"tie_word_embeddings": True}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_layers", "sizes"), [(6, [3, 3]), (7, [3, 2, 2]), (5, [2, 1, 1, 1]), (3, [1, 1, 1]), (4, [4])])
def test_layers_are_dealt_evenly_and_in_order(num_layers: int, sizes: list[int]) -> None:
    stages = [Stage(index, len(sizes)).layers(num_layers) for index in range(len(sizes))]

    assert [index for layers in stages for index in layers] == list(range(num_layers))
    # the last, which has the head, has no more than any other
    assert sorted(map(len, stages)) == sorted(sizes)
    assert len(stages[-1]) == min(sizes)


def test_no_other_deal_makes_the_slowest_stage_faster() -> None:
    for count in range(2, 5):
        for num_layers in range(count, 13):
            for head in (0.0, 0.3, 1.0, 1.7, 4.5, 30.0):
                deals = [
                    [end - start for start, end in pairwise((0, *cuts, num_layers))]
                    for cuts in combinations(range(1, num_layers), count - 1)
                ]
                dealt = deal_layers(num_layers, count, head)
                slowest = {tuple(deal): max(*deal[:-1], deal[-1] + head) for deal in deals}

                assert slowest[tuple(dealt)] == min(slowest.values())
                assert max(dealt[:-1]) - min(dealt[:-1]) <= 1


# hidden and intermediate size, heads, key-value heads, size of a head, layers, vocabulary
SHAPES = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64, 30, 49152),
    "Llama-3.2-1B": (2048, 8192, 32, 8, 64, 16, 128256),
    "Qwen2.5-7B": (3584, 18944, 28, 4, 128, 28, 152064),
    "Qwen2.5-72B": (8192, 29568, 64, 8, 128, 80, 152064),
}


@pytest.mark.parametrize(
    ("name", "bits", "sizes"),
    [
        ("SmolLM2-135M", 16, [19, 11]),
        ("SmolLM2-135M", 16, [10, 10, 9, 1]),
        ("Llama-3.2-1B", 16, [10, 6]),
        ("Qwen2.5-7B", 16, [15, 13]),
        ("Qwen2.5-7B", 4.25, [18, 10]),
        ("Qwen2.5-7B", 16, [8, 8, 7, 5]),
        ("Qwen2.5-72B", 16, [41, 39]),
        ("Qwen2.5-72B", 16, [11, 10, 10, 10, 10, 10, 10, 9]),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_layers_are_dealt_by_what_they_and_the_head_cost(name: str, bits: float, sizes: list[int], tied: bool) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    shape = dict(zip((*names, "num_hidden_layers", "vocab_size"), SHAPES[name], strict=True))
    config = ModelConfig.from_hf(LLAMA | shape | {"tie_word_embeddings": tied})
    head = head_cost(config, layer_bits=bits)

    assert [len(Stage(index, len(sizes), head).layers(config.num_layers)) for index in range(len(sizes))] == sizes


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_the_weights_of_all_stages_are_those_of_the_model(config: dict) -> None:
    model = ModelConfig.from_hf(config)
    embedding = 97 * 48 * 4 if config is TIED else 0

    assert sum(weight_bytes(model, 4, 1, stage=Stage(index, 3)) for index in range(3)) == weight_bytes(model, 4, 1) + embedding
    assert weight_bytes(model, 4, 1, stage=Stage(0, 3), tied_copies=2) == weight_bytes(model, 4, 1, stage=Stage(0, 3))


def load_stage(config: WorkerConfig, stage: Stage, report=lambda *_: None, vision: VisionConfig | None = None) -> DecoderLM:
    model_config = ModelConfig.from_hf(config.files.config, vision=True)
    decoder, _ = load_model(
        config,
        model_config,
        max_length=64,
        device=CPU,
        free=1 << 40,
        group=Group(),
        stage=stage,
        report=report,
        vision=vision,
    )
    return decoder


@pytest.mark.parametrize(
    ("config", "settings"),
    [(LLAMA, {}), (TIED, {}), (TIED, {"data_type": "bfloat16", "quant_type": "a8w8"})],
    ids=["untied", "tied", "rotated"],
)
def test_stages_one_after_the_other_are_the_model(config: dict, settings: dict) -> None:
    worker = toy.worker_config((), config, load_format="dummy", **settings)
    ids = torch.arange(17)
    batch = PagedBatch.build([0], [17], [[1, 0]], block_size=toy.BLOCK_SIZE, device=CPU)
    dtype = getattr(torch, worker.data_type)

    def through(count: int) -> torch.Tensor | None:
        x = ids
        for index in range(count):
            stage = Stage(index, count, head=1.2)
            model = load_stage(worker, stage)
            caches = allocate_kv_cache(model.config, 2, toy.BLOCK_SIZE, dtype, CPU, 1, stage=stage)
            assert len(caches) == len(model.layers)
            x = model.forward(x, batch, caches)
        return model.logits(x)

    expected = through(1)

    for count in (2, 3):
        torch.testing.assert_close(through(count), expected)


def test_progress_is_that_of_the_stage() -> None:
    reports = []
    load_stage(toy.worker_config((), LLAMA, load_format="dummy"), Stage(1, 3), lambda *report: reports.append(report))
    done, total = [report[1] for report in reports], reports[0][2]

    assert done == sorted(done)
    assert done[-1] == total == weight_bytes(ModelConfig.from_hf(LLAMA), 2, 1, stage=Stage(1, 3))


def test_a_stage_does_not_run_without_a_tensor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    make = DummySource.__init__
    monkeypatch.setattr(
        DummySource, "__init__", lambda self, shapes: make(self, {name: shapes[name] for name in shapes if name != HEAD})
    )
    worker = toy.worker_config((), LLAMA, load_format="dummy")

    load_stage(worker, Stage(0, 2))
    with pytest.raises(UnsupportedModel, match=r"the weights lack the tensor lm_head\.weight"):
        load_stage(worker, Stage(1, 2))


def test_a_model_that_sees_is_not_split() -> None:
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "text_config": toy.SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"hidden_size": 48},
    }
    with pytest.raises(
        UnsupportedModel, match="a model that sees cannot be split into stages; use --tensor-parallel, or --mode"
    ):
        load_stage(toy.worker_config((), config, load_format="dummy"), Stage(0, 2), vision=VisionConfig.from_hf(config))
