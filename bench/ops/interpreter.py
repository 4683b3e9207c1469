"""Triton's interpreter, for machines without a GPU."""

import os
import sys

from dashinfer_kernels import dispatch


def load_triton() -> None:
    """Import Triton such that its kernels are interpreted. Once more does nothing.

    Triton asks for the interpreter when it is imported and again at every `@triton.jit`, so this comes before both. No
    environment variable stays: subprocesses would inherit it.
    """
    if "triton" in sys.modules:
        interpreted = sys.modules["triton"].knobs.runtime.interpret
        assert interpreted, "Triton's own functions were compiled before the interpreter could be switched on"
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True  # sets the variable too
    del os.environ["TRITON_INTERPRET"]
    if triton.__version__.startswith("3.6."):  # its loop bounds are arrays of one element, which NumPy 2.4 makes no integers of
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_index


def switch_on() -> None:
    """CPU tensors take the ops' Triton path from now on, under the interpreter. Comes before Triton is imported."""
    load_triton()
    dispatch.interpreting = True
