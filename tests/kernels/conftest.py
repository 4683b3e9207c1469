"""Every kernel test starts from the same random state, on one thread (tensors are small), and records no gradients.

Where there is no GPU, Triton kernels run under Triton's interpreter, which is switched on here before any kernel is imported.
"""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from bench.gpu.selection import runs_on_gpu
from bench.ops import interpreter
from dashinfer_kernels import dispatch

if not torch.cuda.is_available() and find_spec("triton"):
    interpreter.load_triton()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ops take their Triton path. The device that tensors go to: "cuda" where there is one, else "cpu"."""
    assert runs_on_gpu(request.node), "a GPU run would leave this test out"
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(dispatch, "interpreting", True)
    return "cpu"
