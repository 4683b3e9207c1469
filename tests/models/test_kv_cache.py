"""Caches of every type: their size, and how far a quantised one moves a model's logits."""

import pytest
import torch

from dashinfer.models.kv_cache import allocate_kv_cache, kv_bytes_per_block, kv_dtype
from tests.models import toy

CONFIG = toy.SIZES | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
PROMPT = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(2)).tolist()


def test_what_a_cache_holds():
    assert [kv_dtype(name, "float16") for name in ("auto", "int8", "fp8")] == [torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_quantised_cache_has_a_scale_for_each_token_and_head(name):
    config = toy.load(toy.worker_config((), CONFIG, load_format="dummy")).config
    dtype = kv_dtype(name, "bfloat16")
    caches = allocate_kv_cache(config, 5, 16, dtype, torch.device("cpu"), 1)

    assert [(cache.values.dtype, cache.values.shape) for cache in caches] == [(dtype, (5, 2, 2, 16, 32))] * 3
    assert [(cache.scales.dtype, cache.scales.shape) for cache in caches] == [(torch.float32, (5, 2, 2, 16))] * 3
    total = sum(cache.values.nbytes + cache.scales.nbytes for cache in caches)
    assert total == 5 * kv_bytes_per_block(config, 16, dtype, 1)
    assert total / (5 * kv_bytes_per_block(config, 16, torch.bfloat16, 1)) == (32 + 4) / 64


@pytest.mark.parametrize("data_type", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        pytest.param("int8", 0.02, marks=pytest.mark.feature("Quantisation", "KV cache of 8-bit integers")),
        pytest.param("fp8", 0.05, marks=pytest.mark.feature("Quantisation", "KV cache of float8")),
    ],
)
def test_logits_stay_near_those_of_an_unquantised_cache(name, allowed, data_type):
    """Prefill, a second chunk and decoding; as a share of the logits' own size."""
    model = toy.load(toy.worker_config((), CONFIG, load_format="dummy", data_type=data_type))
    logits = []
    for each in ("auto", name):
        session = toy.Session(model, 96, dtype=kv_dtype(each, data_type))
        logits.append(torch.cat([session.run(PROMPT[begin:end]) for begin, end in ((0, 60), (60, 88), (88, 89), (89, 90))]))

    error = (logits[1] - logits[0]).norm(dim=1) / logits[0].norm(dim=1)
    assert 0 < error.max() < allowed
