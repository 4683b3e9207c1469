"""Every kernel test starts from the same random state, on one thread (tensors are small), and records no gradients.

Where there is no GPU, Triton kernels run under Triton's interpreter. Triton asks for it when it is imported and again at every
`@triton.jit`, so it is switched on here before any kernel is imported, and not by an environment variable that stays:
subprocesses would inherit that.
"""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from dashinfer_kernels import dispatch

if not torch.cuda.is_available() and find_spec("triton"):
    assert "triton" not in sys.modules, "Triton's own functions were compiled before the interpreter could be switched on"
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True  # sets the variable too
    del os.environ["TRITON_INTERPRET"]

    if triton.__version__.startswith("3.6."):  # its loop bounds are arrays of one element, which NumPy 2.4 makes no integers of
        from triton.runtime import interpreter

        _patch_lang_tensor = interpreter._patch_lang_tensor

        def _patch_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
            _patch_lang_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = _patch_index


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> str:
    """Ops take their Triton path. The device that tensors go to: "cuda" where there is one, else "cpu"."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(dispatch, "interpreting", True)
    return "cpu"
