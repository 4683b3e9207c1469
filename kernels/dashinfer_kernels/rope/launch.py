"""Public function of the rotary embedding and the cache write."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.rope import cpu

# Types of a quantised cache, and the largest value of each that is used.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    kv_scales: Tensor | None = None,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """Split the projection of queries, keys and values, norm and rotate queries and keys, write keys and values to the cache.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; queries, then keys, then values. Overwritten.
        positions: [tokens] int64, each token's place in its sequence; or [3, tokens], its temporal, height and width
            positions. On CPU this, `cos_sin` and `slot_mapping` are not changed in place between layers or steps: a new step
            brings new tensors.
        cos_sin: [max_positions, rotary_dim] float32, contiguous, cosines in the first half; rotary_dim is even and at most
            head_dim, and dimensions beyond it are not rotated.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], keys and then values of each block, contiguous; written
            in place. A floating type, or int8 or float8_e4m3fn with `kv_scales`; float8 on a GPU needs compute capability 8.9.
        slot_mapping: [tokens] int64, block * block_size + offset, no slot twice; -1: padding, nothing is written.
        q_norm: [head_dim], an RMS norm over each query head before the rotation; given together with `k_norm`.
        k_norm: [head_dim], the same for keys.
        eps: of those norms.
        kv_scales: [num_blocks, 2, num_kv_heads, block_size] float32, contiguous, written in place: what a stored key or value
            is multiplied with.
        mrope_section: with three positions a token, how many of the rotary_dim / 2 frequencies each of them turns.
        mrope_interleaved: those frequencies take turns (Qwen3-VL) instead of lying together (Qwen2-VL).

    Returns:
        The rotated queries, [tokens, num_heads, head_dim], the type of `qkv`; may be a view of `qkv`, with gaps between tokens.

    Raises:
        IndexError: a position or slot outside of its table (on CPU).
    """
    tokens = qkv.shape[0]
    assert qkv.shape == (tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    assert slot_mapping.shape == (tokens,)
    assert positions.shape == ((tokens,) if positions.ndim == 1 else (3, tokens))
    assert positions.ndim == 1 or (mrope_section is not None and 2 * sum(mrope_section) == cos_sin.shape[1])
    assert cos_sin.shape[1] <= head_dim
    assert cos_sin.shape[1] % 2 == 0
    assert cos_sin.dtype == torch.float32
    assert kv_cache.shape[1:3] == (2, num_kv_heads)
    assert kv_cache.shape[4] == head_dim
    assert (q_norm is None) == (k_norm is None)
    assert (kv_scales is None) == (kv_cache.dtype not in _LARGEST)
    assert kv_scales is None or (kv_scales.shape == kv_cache.shape[:4] and kv_scales.dtype == torch.float32)
    tensors = (qkv, positions, cos_sin, kv_cache, slot_mapping)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
    path = _launch if use_triton(qkv) else cpu.rope_kv_write
    rotation = {"mrope_section": mrope_section, "mrope_interleaved": mrope_interleaved}
    return path(*tensors, **heads, **norms, kv_scales=kv_scales, **rotation)


def _launch(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    kv_scales: Tensor | None,
    mrope_section: tuple[int, int, int] | None,
    mrope_interleaved: bool,
) -> Tensor:
    assert qkv.is_contiguous() and cos_sin.is_contiguous() and kv_cache.is_contiguous()
    assert kv_scales is None or kv_scales.is_contiguous()
    assert positions.stride(-1) == slot_mapping.stride(0) == 1
    tokens, heads, rotary_dim = qkv.shape[0], num_heads + 2 * num_kv_heads, cos_sin.shape[1]
    mrope = positions.ndim == 2
    temporal, height, width = mrope_section if mrope and mrope_section else (0, 0, 0)
    if tokens:
        rows, half, rest, num_warps = _tile(head_dim, rotary_dim)
        _kernels().rope_kv_write_kernel[(-(-tokens * heads // rows),)](
            qkv_ptr=qkv,
            positions_ptr=positions,
            cos_sin_ptr=cos_sin,
            kv_cache_ptr=kv_cache,
            kv_scales_ptr=kv_scales,
            slot_mapping_ptr=slot_mapping,
            q_norm_ptr=q_norm,
            k_norm_ptr=k_norm,
            tokens=tokens,
            positions_stride=positions.stride(0),
            eps=eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=rotary_dim,
            BLOCK_SIZE=kv_cache.shape[3],
            BLOCK_ROWS=rows,
            BLOCK_HALF=half,
            BLOCK_REST=rest,
            SECTION_T=temporal,
            SECTION_H=height,
            SECTION_W=width,
            LARGEST=_LARGEST.get(kv_cache.dtype, 0.0),
            USE_NORM=q_norm is not None,
            USE_MROPE=mrope,
            USE_INTERLEAVED=mrope and mrope_interleaved,
            USE_SCALES=kv_scales is not None,
            num_warps=num_warps,
        )
    return qkv.view(tokens, heads, head_dim)[:, :num_heads]


@cache
def _tile(head_dim: int, rotary_dim: int) -> tuple[int, int, int, int]:
    """Rows a program, columns of half the rotated and of the other dimensions, and warps: 16 elements a thread."""
    half = _power_of_two(rotary_dim // 2)
    rest = _power_of_two(head_dim - rotary_dim) if rotary_dim < head_dim else 0
    tuned = tuning.lookup("rope_kv_write", (head_dim, rotary_dim)) or {}
    rows = tuned.get("rows", 2048 // _power_of_two(2 * half + rest))
    return rows, half, rest, tuned.get("num_warps", 4)


def _power_of_two(size: int) -> int:
    """The least that is not smaller."""
    return 1 << (size - 1).bit_length()


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.rope import kernel

    return kernel
