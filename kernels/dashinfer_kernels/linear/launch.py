"""Public function of linear layers: weights in the layout that the device multiplies fastest."""

from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.linear.cpu import PackedLinear
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quantized_rows import QuantizedRows


class Linear(Protocol):
    """A linear layer that owns its weights."""

    in_features: int
    out_features: int
    nbytes: int  # what the layer holds
    takes: Activations | None  # how inputs are quantised; a layer that does that takes them quantised, too

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of the weights."""
        ...

    def wide(self, x: Tensor | QuantizedRows) -> Tensor:
        """[rows, in_features] to [rows, out_features] float32; on a GPU sums are not rounded to a narrower type before."""
        ...


class PlainLinear:
    """A layer on a GPU: `F.linear`, which looks at the number of rows, or in deterministic mode a kernel that does not."""

    takes = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if dispatch.deterministic:
            return invariant_linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def wide(self, x: Tensor) -> Tensor:
        if dispatch.deterministic:
            return invariant_linear(x, self._weight, self._bias, dtype=torch.float32)
        if self._bias is None and x.is_cuda and x.itemsize == 2 and torch.version.hip is None:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        return self(x).float()


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """A linear layer in Triton whose rows have the same bits however many there are.

    Args:
        x: [..., in_features], the type of `weight`: float16, bfloat16 or float32.
        weight: [out_features, in_features], contiguous.
        bias: [out_features], the type of `weight`, or None.
        dtype: of the result; None: that of `x`.

    Returns:
        [..., out_features]; summed in float32 and rounded once.
    """
    out_features, in_features = weight.shape
    assert x.shape[-1] == in_features
    assert x.dtype == weight.dtype
    assert weight.is_contiguous()
    x_rows = x.reshape(-1, in_features).contiguous()
    rows = len(x_rows)
    out = torch.empty(*x.shape[:-1], out_features, dtype=dtype or x.dtype, device=x.device)
    if rows == 0:
        return out
    config = tuning.lookup("invariant_linear", (str(x.dtype), out_features, in_features))
    config = config or invariant_config(x.dtype, out_features)
    use_descriptors = _has_descriptors(x.device) and in_features * x.itemsize % 16 == 0
    left, right = x_rows, weight
    if use_descriptors:
        if x_rows.data_ptr() % 16:
            left = x_rows.clone()
        left = _descriptor(left, (config["BLOCK_ROWS"], config["BLOCK_IN"]))
        right = _descriptor(weight, (config["BLOCK_OUT"], config["BLOCK_IN"]))
    grid = (-(-rows // config["BLOCK_ROWS"]) * -(-out_features // config["BLOCK_OUT"]),)
    _kernel().linear_kernel[grid](
        left,
        right,
        bias_ptr=weight if bias is None else bias,
        out_ptr=out,
        rows=rows,
        out_features=out_features,
        IN_FEATURES=in_features,
        USE_BIAS=bias is not None,
        USE_DESCRIPTORS=use_descriptors,
        **config,
    )
    return out


def invariant_config(dtype: torch.dtype, out_features: int) -> dict[str, Any]:
    """Launch parameters by the layer's shape alone, for layers that no bench has measured.

    Few rows cost the time of reading the weights, for which there must be enough programs; many are multiplied faster in wide
    tiles. Without split sums only the number of outputs can tell which.
    """
    if dtype == torch.float32:
        return {"BLOCK_ROWS": 32, "BLOCK_OUT": 64, "BLOCK_IN": 32, "GROUP_ROWS": 8, "num_warps": 4, "num_stages": 3}
    wide = out_features >= 128 * 128
    block_out, num_warps = (128, 8) if wide else (64, 4)
    return {
        "BLOCK_ROWS": 128,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": 64,
        "GROUP_ROWS": 8,
        "num_warps": num_warps,
        "num_stages": 4 if torch.version.hip is None else 2,  # what shared memory has room for
    }


@cache
def _kernel() -> ModuleType:
    from dashinfer_kernels.linear import kernel

    return kernel


@cache
def _has_descriptors(device: torch.device) -> bool:
    """Whether tiles can be copied by the tensor memory accelerator (NVIDIA GPUs from Hopper on)."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _descriptor(x: Tensor, block: tuple[int, int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Take over a layer's weights. The caller should drop its own reference: on CPU the layer keeps a copy in another layout.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], the type of `weight`, or None.
    """
    assert weight.ndim == 2
    assert bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    return PlainLinear(weight, bias) if dispatch.use_triton(weight) else PackedLinear(weight, bias)
