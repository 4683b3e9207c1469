"""Paged attention: decode over long and uneven contexts, and prefill with and without a cached prefix.

One layer's call is measured; what all layers of a step share is made before, as it is in a step.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.case import COPY_MARK, Case, Job, Mark, Model, Place, poisoned, relative_error
from dashinfer_kernels import PagedBatch, paged_attention

BLOCK_SIZE = 64  # the engine's on CUDA
LARGE_BLOCK = 128  # what a prefill kernel may read in one piece; measured for the first model
CHECKED_ROWS = 32  # query rows of a case that are compared with the reference
MOST_LIBRARY_BYTES = 40 << 30  # of keys and values laid out for a library call
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
PREFILL_MARKS = (Mark(">= 55% of the matmul rate", "fraction", 0.55), Mark(">= 1.0x SDPA flash", "SDPA flash", 1.0))


def decode_jobs(place: Place) -> list[Job]:
    found = []
    for model in place.models:
        if place.toy:
            found += [_decode_job(place, model, "1 x 40", [40]), _decode_job(place, model, "skewed", [70, 3, 1])]
            continue
        for batch in (64, 1, 8):
            for name, context in (("4k", 4096), ("128k", 131072), ("1k", 1024), ("32k", 32768)):
                marks = (COPY_MARK,) if (batch, name) in ((64, "4k"), (1, "128k")) else ()
                found.append(_decode_job(place, model, f"{batch} x {name}", [context] * batch, marks))
                if marks and model is place.models[0]:
                    shape = f"{batch} x {name}, blocks of {LARGE_BLOCK}"
                    found.append(_decode_job(place, model, shape, [context] * batch, block_size=LARGE_BLOCK))
        found.append(_decode_job(place, model, "1 x 128k and 31 x 1k", [131072] + [1024] * 31))
    return found


def _decode_job(
    place: Place,
    model: Model,
    shape: str,
    contexts: list[int],
    marks: tuple[Mark, ...] = (),
    block_size: int = BLOCK_SIZE,
) -> Job:
    build = partial(_build, place, model, [context - 1 for context in contexts], [1] * len(contexts), block_size)
    return Job("decode_attention", model, shape, build, marks, len(contexts))


def prefill_jobs(place: Place) -> list[Job]:
    found = []
    for model in place.models:
        lengths = {"21": 21} if place.toy else {"2k": 2048, "8k": 8192, "32k": 32768, "4k": 4096, "16k": 16384}
        prefixes = {"20 after 30": (30, 20)} if place.toy else {"2k after 30k": (30720, 2048), "512 after 32k": (32768, 512)}
        for shape, length in lengths.items():
            build = partial(_build, place, model, [0], [length])
            found.append(Job("prefill_attention", model, shape, build, PREFILL_MARKS, length))
            if model is place.models[0]:
                build = partial(_build, place, model, [0], [length], LARGE_BLOCK)
                found.append(Job("prefill_attention", model, f"{shape}, blocks of {LARGE_BLOCK}", build, (), length))
        for shape, (start, length) in prefixes.items():
            found.append(Job("prefill_attention", model, shape, partial(_build, place, model, [start], [length]), (), length))
        many, length = (3, 20) if place.toy else (16, 512)
        build = partial(_build, place, model, [0] * many, [length] * many)
        found.append(Job("prefill_attention", model, f"{many} x {length}", build, (), many * length))
    return found


def _build(place: Place, model: Model, starts: list[int], lengths: list[int], block_size: int = BLOCK_SIZE) -> Case:
    """Sequences with `starts` cached tokens that compute `lengths` more."""
    contexts = [start + length for start, length in zip(starts, lengths, strict=True)]
    tokens, item = sum(lengths), place.dtype.itemsize
    scale = model.head_dim**-0.5
    moved = (2 * sum(contexts) * model.kv_heads + 2 * tokens * model.heads) * model.head_dim * item
    seen = sum(length * start + length * (length + 1) // 2 for start, length in zip(starts, lengths, strict=True))
    copies = place.copies(moved)
    per_sequence = [-(-context // block_size) for context in contexts]
    num_blocks = sum(per_sequence)
    cache = place.normal(copies * num_blocks, 2, model.kv_heads, block_size, model.head_dim)
    order = torch.randperm(copies * num_blocks, dtype=torch.int32).view(copies, num_blocks)
    batches = []
    for blocks in order:
        tables = torch.zeros(len(contexts), max(per_sequence), dtype=torch.int32)
        for row, part in zip(tables, blocks.split(per_sequence), strict=True):
            row[: len(part)] = part
        batches.append(PagedBatch.build(starts, lengths, tables, block_size=block_size, device=place.device))
    queries = [place.normal(tokens, model.heads, model.head_dim) for _ in range(copies)]

    def call(q: Tensor, batch: PagedBatch) -> Tensor:
        return paged_attention(q, cache, batch, scale=scale)

    def verify() -> float:
        with poisoned():
            out = call(queries[0], batches[0])
        if not out.isfinite().all():
            return float("inf")
        rows, expected = _checked_rows(queries[0], cache, batches[0], starts, lengths, scale)
        return relative_error(out[rows], expected)

    def reset() -> None:
        for batch in batches:
            batch.plans.clear()

    libraries = {} if place.toy or len(set(contexts)) > 1 else _libraries(place, model, len(contexts), lengths[0], contexts[0])
    return Case(
        calls=[partial(call, q, batch) for q, batch in zip(queries, batches, strict=True)],
        verify=verify,
        bytes_moved=moved,
        flops=4 * seen * model.heads * model.head_dim,
        tolerance=2e-2,
        libraries=libraries,
        reset=reset,
    )


def _checked_rows(
    q: Tensor, cache: Tensor, batch: PagedBatch, starts: list[int], lengths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Rows spread over the first, longest and last sequence, the first and last token of each among them: indices, and float64
    attention [rows, num_heads * head_dim]."""
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    longest = max(range(len(starts)), key=lambda index: starts[index] + lengths[index])
    rows, expected = [], []
    for sequence in sorted({0, longest, len(starts) - 1}):
        start, length = starts[sequence], lengths[sequence]
        begin, context = sum(lengths[:sequence]), start + length
        blocks = batch.block_tables[sequence, : -(-context // batch.block_size)].long()
        k, v = (
            part.transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :context].to(torch.float64)
            for part in cache[blocks].unbind(1)
        )
        for index in sorted({int(part) for part in torch.linspace(0, length - 1, min(length, CHECKED_ROWS)).tolist()}):
            last = start + index + 1
            query = q[begin + index].to(torch.float64).view(kv_heads, -1, head_dim)
            weights = torch.softmax(query @ k[:, :last].transpose(1, 2) * scale, -1)
            rows.append(begin + index)
            expected.append((weights @ v[:, :last]).reshape(-1))
    return torch.tensor(rows, device=q.device), torch.stack(expected)


def _libraries(place: Place, model: Model, batch: int, length: int, context: int) -> dict[str, list[Callable[[], Tensor]]]:
    """SDPA over keys and values that lie dense, by those of its backends that take them."""
    kv_bytes = 2 * batch * context * model.kv_heads * model.head_dim * place.dtype.itemsize
    if kv_bytes > MOST_LIBRARY_BYTES:
        return {}
    from torch.nn.attention.bias import causal_lower_right  # imports Triton, which the interpreter must come before

    causal = length > 1
    mask = causal_lower_right(length, context) if causal and length < context else None
    sets = []
    for _ in range(place.copies(kv_bytes)):
        q = place.normal(batch, length, model.heads, model.head_dim).transpose(1, 2)
        k, v = (place.normal(batch, context, model.kv_heads, model.head_dim).transpose(1, 2) for _ in range(2))
        sets.append((q, k, v))

    def call(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True)

    return {name: [partial(call, backend, *each) for each in sets] for name, backend in BACKENDS.items()}
