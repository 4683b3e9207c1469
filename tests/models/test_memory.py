"""Memory that weights need, and that a machine or a container has left."""

from pathlib import Path

import pytest

from dashinfer.errors import InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.models.memory import available_memory, check_memory, weight_bytes

from . import toy

GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "proc", root / "cgroup"


MEMINFO = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree: 5 kB\nMemAvailable: {8 << 20} kB\nHugePages_Total: 0\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}, 8 * GIB),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": f"{4 * GIB}\n",
                "cgroup/memory.current": f"{3 * GIB}\n",
                "cgroup/memory.stat": f"anon 7\ninactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        (  # a limit further up
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/memory.max": f"{2 * GIB}\n",
                "cgroup/a/memory.current": f"{GIB}\n",
                "cgroup/a/b/memory.max": "max\n",
            },
            GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/pod\n0::/\n",
                "cgroup/memory/pod/memory.limit_in_bytes": f"{6 * GIB}\n",
                "cgroup/memory/pod/memory.usage_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/pod/memory.stat": f"total_inactive_file {GIB}\n",
            },
            5 * GIB,
        ),
        (  # used beyond the limit
            {"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "10\n", "cgroup/memory.current": "20\n"},
            0,
        ),
    ],
)
def test_available_memory(files, expected, tmp_path):
    assert available_memory(*machine(tmp_path, MEMINFO | files)) == expected


def test_this_machine_has_some():
    assert available_memory() > 1 << 20


def test_the_weights_of_a_model_are_what_it_holds(tmp_path):
    reference = toy.hf_model("Qwen3ForCausalLM", head_dim=16)
    parameters = sum(weight.numel() for weight in reference.parameters())
    config = ModelConfig.from_hf(toy.SIZES | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16})

    assert weight_bytes(config, 4, 1) == 4 * parameters
    assert weight_bytes(config, 2, 2) == parameters


def test_the_head_of_a_tied_model_may_count_twice():
    config = ModelConfig.from_hf(toy.SIZES | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})

    assert weight_bytes(config, 2, 1, tied_copies=2) - weight_bytes(config, 2, 1) == 2 * 97 * 48


def test_too_little_memory_says_what_to_change():
    check_memory("some/model", 5 * GIB, 5 * GIB, "float32", "memory")

    with pytest.raises(InsufficientMemory) as caught:
        check_memory("some/model", 5 * GIB + GIB // 2, 300 << 20, "float32", "memory")
    assert str(caught.value) == (
        "some/model: the weights need 5.5 GiB in float32, but only 300 MiB of memory is free; "
        "use --data-type bfloat16, a smaller model, or free some memory"
    )
    for kind, advice in (
        ("bfloat16", "use --quant-type a16w8 or a16w4, a smaller model, or"),
        ("a8w8", "use --quant-type a16w4, a smaller"),
        ("a16w4", "use a smaller model,"),
    ):
        with pytest.raises(InsufficientMemory, match=f"in {kind}, .*; {advice}"):
            check_memory("some/model", 2, 1, kind, "memory")


def test_quantised_layers_take_their_bits_and_the_rest_what_it_did():
    config = ModelConfig.from_hf(toy.SIZES | {"architectures": ["LlamaForCausalLM"]})
    layers = 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80)

    assert weight_bytes(config, 2, 1) - weight_bytes(config, 2, 1, layer_bits=4.5) == layers * 2 - layers * 4.5 / 8
