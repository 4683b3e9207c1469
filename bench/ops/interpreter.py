"""Triton's interpreter, for machines without a GPU."""

import os
import sys
from typing import Any

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
    _round_to_float8()
    _multiply_each_row_alike()
    if triton.__version__.startswith("3.6."):  # its loop bounds are arrays of one element, which NumPy 2.4 makes no integers of
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_index


def _round_to_float8() -> None:
    """float32 becomes float8 as on a GPU: the nearest, ties to even, with numbers that are too large made the largest.

    The interpreter's own rounding loses the carry from the last mantissa of an exponent to the next.
    """
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(array: Any, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(array, source, target, rounding_mode)
        wide = torch.from_numpy(np.array(array).view(np.float32)).clamp(-448.0, 448.0)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = convert_float


def _multiply_each_row_alike() -> None:
    """A row of a product has the same bits wherever in its tile it lies, as on a GPU.

    The interpreter leaves products to NumPy, whose BLAS may sum some rows of a matrix in another order than others: OpenBLAS
    does so on processors without AVX-512. Products of one row each have no such others.
    """
    import numpy as np
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_by_rows(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if a.dtype.primitive_bitwidth == 8:
            return create_dot(self, a, b, d, *precision)
        rows = np.expand_dims(a.data, -2)
        product = np.matmul(rows, np.expand_dims(b.data, -3), dtype=d.data.dtype).squeeze(-2)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot_by_rows


def switch_on() -> None:
    """CPU tensors take the ops' Triton path from now on, under the interpreter. Comes before Triton is imported."""
    load_triton()
    dispatch.interpreting = True
