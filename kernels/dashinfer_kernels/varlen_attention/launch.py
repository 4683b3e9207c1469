"""Public function of bidirectional attention within sequences, and how its kernel is launched."""

import math
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.varlen_attention import cpu

_SEQUENCES_AT_ONCE = 256


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
) -> Tensor:
    """Attention of every token to all tokens of its own sequence. A window is a sequence.

    Args:
        q: [tokens, num_heads, head_dim], any strides of tokens and heads that are multiples of 8 elements, so slices of a
            fused product will do. head_dim is a multiple of 8, on a GPU 16 to 128.
        k: [tokens, num_kv_heads, head_dim], as `q`; num_heads is a multiple of num_kv_heads, and query heads that share a KV
            head are neighbours.
        v: as `k`.
        cu_seqlens: [sequences + 1] int32 on the device of `q`: 0, then where each sequence ends; the last one is `tokens`.
            Sequences may be empty. On a GPU its values are never read by the host.
        max_seqlen: no sequence is longer.
        scale: what scores are multiplied with, positive, usually head_dim ** -0.5.

    Returns:
        [tokens, num_heads * head_dim], the type of `q`.
    """
    tokens, num_heads, head_dim = q.shape
    assert k.shape == v.shape
    assert k.shape[0] == tokens
    assert k.shape[2] == head_dim
    assert num_heads % k.shape[1] == 0
    assert q.dtype == k.dtype == v.dtype
    assert cu_seqlens.dtype == torch.int32
    assert scale > 0
    if dispatch.use_triton(q):
        return _launch(q, k, v, cu_seqlens, max_seqlen, scale)
    return cpu.varlen_attention(q, k, v, cu_seqlens, scale=scale)


def _launch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    tokens, num_heads, head_dim = q.shape
    for x in (q, k, v):
        assert x.stride(2) == 1
        assert x.stride(0) % 8 == x.stride(1) % 8 == 0
        assert x.stride(0) < 2**24  # offsets within a tile are 32-bit
    assert head_dim % 8 == 0 and 16 <= head_dim <= 128
    out = torch.empty(tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    sequences = len(cu_seqlens) - 1
    if not tokens:
        return out

    config = _config(q, max_seqlen)
    tiles_per_sequence = -(-max_seqlen // config["BLOCK_M"])
    even, packed = sequences * tiles_per_sequence, sequences + tokens // config["BLOCK_M"]
    _kernel().varlen_attention_kernel[(min(even, packed), num_heads)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        cu_seqlens_ptr=cu_seqlens,
        num_sequences=sequences,
        tiles_per_sequence=tiles_per_sequence,
        num_heads=num_heads,
        scale_log2=scale * math.log2(math.e),
        stride_q=q.stride(0) // 8,
        stride_q_head=q.stride(1) // 8,
        stride_k=k.stride(0) // 8,
        stride_k_head=k.stride(1) // 8,
        stride_v=v.stride(0) // 8,
        stride_v_head=v.stride(1) // 8,
        GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim,
        **split_head(head_dim),
        BLOCK_S=_SEQUENCES_AT_ONCE,
        USE_SEARCH=packed < even,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        **config,
    )
    return out


def split_head(head_dim: int) -> dict[str, int]:
    """The powers of two that a head's columns are computed in: BLOCK_D whole, BLOCK_R (0 for none) for what is left."""
    whole = 1 << head_dim.bit_length() - 1
    rest = head_dim - whole
    return {"BLOCK_D": whole, "BLOCK_R": max(16, 1 << (rest - 1).bit_length()) if rest else 0}


def _config(q: Tensor, max_seqlen: int) -> dict[str, int]:
    tokens, num_heads, head_dim = q.shape
    target, processors = _device(q.device)
    if dispatch.deterministic:
        return heuristic(target, q.dtype, head_dim, small=True)
    small = max_seqlen <= 64 or tokens // 128 * num_heads < processors
    key = (str(q.dtype).removeprefix("torch."), head_dim, "small" if small else "large")
    return tuning.lookup("varlen_attention", key) or heuristic(target, q.dtype, head_dim, small=small)


def heuristic(target: str, dtype: torch.dtype, head_dim: int, *, small: bool) -> dict[str, int]:
    """Tile and launch parameters.

    Large tiles read keys least often, and on Hopper occupy two groups of warps; small ones waste least on windows, and fill
    the GPU where there are few tokens.

    Args:
        target: "sm_80" (stands for all that are not named), "sm_90" or "gfx942".
        dtype: of the queries.
        small: windows of up to 64 tokens, or too few tokens to give every multiprocessor a large tile.
    """
    if dtype == torch.float32:  # without tensor cores, for exactness; larger tiles spill
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    stages = 1 if target == "gfx942" else 2
    if small:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": stages}
    if target == "sm_90":
        return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": stages}
    if target == "gfx942":
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": stages}
    return {"BLOCK_M": 128, "BLOCK_N": 64 if head_dim <= 96 else 32, "num_warps": 8, "num_stages": stages}


@cache
def _device(device: torch.device) -> tuple[str, int]:
    if device.type == "cpu":
        return "sm_90", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    return "sm_90" if properties.major == 9 else "sm_80", properties.multi_processor_count


@cache
def _kernel() -> ModuleType:
    from dashinfer_kernels.varlen_attention import kernel

    return kernel
