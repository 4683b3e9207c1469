"""Triton compiles a kernel again for other constants, types and alignments: all of that is done before the first request."""

from itertools import product
from types import ModuleType

import msgspec
import pytest
import torch
from test_executor import CONFIG, MODEL, PaddedGraphs, generate
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.worker.graphs import bucket_sizes
from dashinfer.worker.runner import Runner, costly_plan
from dashinfer_kernels import SamplingBatch, SamplingState, sample, warm_up_sampling
from dashinfer_kernels.activation import launch as activation
from dashinfer_kernels.attention import decode, prefill
from dashinfer_kernels.norm import launch as norm
from dashinfer_kernels.rope import launch as rope
from dashinfer_kernels.sampling import launch as sampling
from dashinfer_kernels.sampling.state import Needs

OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """A module of kernels, whose launches leave in `variants` what Triton compiles them for."""

    def __init__(self, kernels: ModuleType, variants: set[tuple], *, runs: bool) -> None:
        self._kernels = kernels
        self._variants = variants
        self._runs = runs

    def __getattr__(self, name: str) -> object:
        kernel = getattr(self._kernels, name)
        return _Kernel(name, kernel, self._variants, self._runs) if hasattr(kernel, "kwargs") else kernel


class _Kernel:
    def __init__(self, name: str, kernel: object, variants: set[tuple], runs: bool) -> None:
        self._name = name
        self._kernel = kernel
        self._variants = variants
        self._runs = runs
        self._numbers = kernel.kwargs.get("do_not_specialize") or ()
        self._pointers = kernel.kwargs.get("do_not_specialize_on_alignment") or ()

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(**arguments: object) -> None:
            kinds = sorted((name, self._kind(name, value)) for name, value in arguments.items())
            self._variants.add((self._name, *kinds))
            if self._runs:
                self._kernel[grid](**arguments)

        return launch

    def _kind(self, name: str, value: object) -> str:
        if isinstance(value, Tensor):
            aligned = value.data_ptr() % 16 == 0
            return f"{value.dtype}" if name in self._pointers else f"{value.dtype}, {aligned}"
        if name.isupper() or name in OPTIONS or not isinstance(value, int):
            return f"{type(value)}" if isinstance(value, float) else f"{value}"
        return "a number" if name in self._numbers else f"{value == 1}, {value % 16 == 0}"


def record(monkeypatch: pytest.MonkeyPatch, modules: list[ModuleType], *, runs: bool) -> set[tuple]:
    variants: set[tuple] = set()
    for module in modules:
        name = "_kernels" if hasattr(module, "_kernels") else "_kernel"
        recorder = Recorder(getattr(module, name)(), variants, runs=runs)
        monkeypatch.setattr(module, name, lambda recorder=recorder: recorder)
    return variants


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="reads what the interpreter keeps")


@needs_interpreter
@pytest.mark.parametrize("vocab_size", [4500, 152064])
def test_sampling_launches_nothing_new(triton_path: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_multiprocessors", lambda device: 132)
    variants = record(monkeypatch, [sampling], runs=False)
    state = SamplingState(1, 8, vocab_size, device=triton_path, max_edits=8)
    warm_up_sampling(state)
    warm = variants.copy()
    every = [Needs(*each, top) for each in product([False, True], repeat=4) for top in (None, 0, 1, 20)]
    every = [needs for needs in every if needs.draws or not needs.cuts]  # greedy rows have no cuts
    for rows, needs in [*product((1, 5), every), *((rows, every[-1]) for rows in (2, 8, 11, 16, 20, 32, 64))]:
        slots, positions = torch.zeros(2, rows, dtype=torch.int32, device=triton_path)  # as a graph's inputs lie
        words = torch.zeros(rows, -(-vocab_size // 32), dtype=torch.int32, device=triton_path)
        for masks in ((None, None), (words, slots)):
            sample(torch.zeros(rows, vocab_size, device=triton_path), state, SamplingBatch(slots, positions, needs, *masks))

    assert variants == warm
    assert len(warm) < 25


@needs_interpreter
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_serving_launches_nothing_new(triton_path: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL | {"num_hidden_layers": 1, "num_key_value_heads": 1}  # prompts of more than 16 tokens are long ones, then
    config = msgspec.structs.replace(CONFIG, device=triton_path, data_type="float16")
    runner = Runner(config, ModelConfig.from_hf(model), lambda *_: None)
    variants = record(monkeypatch, [activation, decode, prefill, norm, rope, sampling], runs=True)
    runner._executor.launch(costly_plan(60, 4, 48, 8))
    runner._warm_up(4, 48, 8, decodes=not graphs)
    if graphs:
        runner._executor.use_graphs(PaddedGraphs)
        recorded = runner._executor._graphs
        for inputs in recorded.inputs.values():
            recorded.record(inputs)
        assert list(recorded.inputs) == bucket_sizes(4)
    warm = variants.copy()
    assert len({kernel for kernel, *_ in warm}) > 12
    assert sum(kernel == "prefill_kernel" for kernel, *_ in warm) == 2
    generate(runner, max_step_tokens=40)

    new = variants - warm
    assert not new, [next((kernel, set(kinds) - set(most)) for kernel, *most in warm if kernel == name) for name, *kinds in new]
