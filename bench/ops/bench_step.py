"""Time of a model step made of the ops alone: a stack of decoder layers with random weights, no loading, sampling or server.

    python -m bench.ops.bench_step
    python -m bench.ops.bench_step --form a16w4 --cases 1x170
    python -m bench.ops.bench_step --data-type float32 --block-size 64 --fragmented --cases 16x170 1x105p
    python -m bench.ops.bench_step --kv-cache-dtype auto int8 fp8

A case is `SEQUENCESxTOKENS` (each sequence decodes its token number TOKENS) or, with a `p`, a prefill of TOKENS a sequence. The
sizes are those of SmolLM2-135M. Other load on the machine only ever adds time, so `step` is the fastest step seen, and `quiet`
is what a step takes where nothing interferes: the sum, over every call of an op in it, of the fastest that call ever was. The
other columns divide `quiet` by op.
"""

import argparse
import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dashinfer_kernels as ops
from bench.ops.bench_quantized_linear import FORMS, Form, random_layer

CACHE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
DEFAULT_CASES = ["1x170", "4x170", "16x170", "32x170", "32x256", "1x1000", "16x1000", "32x1000", "1x105p", "4x105p", "1x512p"]


@dataclass(frozen=True)
class Shape:
    layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    intermediate: int = 1536
    vocab: int = 49152


class Clock:
    """Calls functions and keeps the fastest time of the first, second, third ... call of a step."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fastest: list[float] = []
        self.call = 0

    def reset(self) -> None:
        self.names, self.fastest = [], []

    def __call__(self, part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before = time.perf_counter()
        result = function(*args, **kwargs)
        spent = time.perf_counter() - before
        if self.call == len(self.names):
            self.names.append(part)
            self.fastest.append(spent)
        else:
            self.fastest[self.call] = min(self.fastest[self.call], spent)
        self.call += 1
        return result

    def parts(self) -> dict[str, float]:
        """Milliseconds by part."""
        sums: dict[str, float] = defaultdict(float)
        for name, spent in zip(self.names, self.fastest, strict=True):
            sums[name] += spent * 1e3
        return sums


class Stack:
    """Decoder layers with random weights over the ops."""

    def __init__(self, shape: Shape, dtype: torch.dtype, form: Form | None, quantize_head: bool) -> None:
        self.shape = shape
        self.clock = Clock()

        def linear(out_features: int, in_features: int, form: Form | None = form) -> ops.Linear:
            if form is not None:
                return random_layer(form, out_features, in_features)
            return ops.pack_linear(torch.randn(out_features, in_features).mul_(in_features**-0.5).to(dtype))

        qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.layers = [
            (
                linear(qkv, shape.hidden),
                linear(shape.hidden, shape.heads * shape.head_dim),
                linear(2 * shape.intermediate, shape.hidden),
                linear(shape.hidden, shape.intermediate),
            )
            for _ in range(shape.layers)
        ]
        self.head = linear(shape.vocab, shape.hidden, form if quantize_head else None)
        self.dtype = dtype
        self.norm = torch.ones(shape.hidden)
        self.caches: list[tuple[Tensor, Tensor | None]] = []
        angles = torch.arange(8192).unsqueeze(1) * 10000.0 ** (-torch.arange(0, 1, 2 / shape.head_dim))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    def use_caches(self, dtype: torch.dtype, num_blocks: int, block_size: int) -> None:
        """Caches that hold random numbers; of a type of one byte, with scales."""
        size = (num_blocks, 2, self.shape.kv_heads, block_size, self.shape.head_dim)
        quantised = dtype.itemsize == 1
        self.caches = []
        for _ in range(self.shape.layers):
            values = torch.randn(size).mul_(40 if quantised else 1).to(dtype)
            self.caches.append((values, torch.full(size[:4], 1 / 40) if quantised else None))

    def step(self, x: Tensor, batch: ops.PagedBatch) -> Tensor:
        """Logits of each sequence's last token, from embeddings [tokens, hidden]."""
        shape, clock = self.shape, self.clock
        residual = x.float()
        x = clock("norm", ops.rms_norm, residual, self.norm, 1e-5, self.dtype)
        for (qkv, o, gate_up, down), (kv_cache, kv_scales) in zip(self.layers, self.caches, strict=True):
            x = clock("linear", qkv, x)
            x = clock(
                "rope", ops.rope_kv_write, x, batch.positions, self.cos_sin, kv_cache, batch.slot_mapping,
                num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, kv_scales=kv_scales,
            )  # fmt: skip
            x = clock("attention", ops.paged_attention, x, kv_cache, batch, scale=shape.head_dim**-0.5, kv_scales=kv_scales)
            x = clock("linear", o, x)
            x = clock("norm", ops.add_rms_norm, x, residual, self.norm, 1e-5)
            x = clock("linear", gate_up, x)
            x = clock("activation", ops.silu_mul, x)
            x = clock("linear", down, x)
            x = clock("norm", ops.add_rms_norm, x, residual, self.norm, 1e-5)
        last = batch.query_starts[1:].long() - 1
        return clock("head", self.head, x.index_select(0, last))


def parse_case(text: str) -> tuple[int, int, bool]:
    """(sequences, tokens, prefill) of a case such as `16x170` or `1x105p`."""
    sequences, tokens = text.removesuffix("p").split("x")
    return int(sequences), int(tokens), text.endswith("p")


def blocks_needed(case: str, block_size: int) -> int:
    sequences, tokens, _ = parse_case(case)
    return sequences * -(-tokens // block_size)


def measure(stack: Stack, case: str, block_size: int, order: list[int], seconds: float) -> dict[str, float]:
    """Milliseconds: `step`, `quiet` and the parts."""
    sequences, tokens, prefill = parse_case(case)
    pages = -(-tokens // block_size)
    blocks = iter(order)
    tables = [list(itertools.islice(blocks, pages)) for _ in range(sequences)]
    starts = [0 if prefill else tokens - 1] * sequences
    lengths = [tokens if prefill else 1] * sequences
    x = torch.randn(sum(lengths), stack.shape.hidden).to(stack.dtype)

    def run() -> float:
        before = time.perf_counter()
        stack.clock.call = 0
        batch = stack.clock("build", ops.PagedBatch.build, starts, lengths, tables, block_size=block_size, device="cpu")
        stack.step(x, batch)
        return (time.perf_counter() - before) * 1e3

    run()
    stack.clock.reset()
    fastest = run()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        fastest = min(fastest, run())
    parts = stack.clock.parts()
    return {"step": fastest, "quiet": sum(parts.values())} | parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, metavar="CASE")
    parser.add_argument("--data-type", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"], choices=["auto", *CACHE_TYPES])
    parser.add_argument("--form", default="bfloat16", choices=list(FORMS), help="of linear layers, with --data-type bfloat16")
    parser.add_argument("--quantize-head", action="store_true")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--fragmented", action="store_true", help="scatter each sequence's blocks over the cache")
    parser.add_argument("--deterministic", action="store_true", help="as --deterministic makes the server compute")
    options = parser.parse_args()

    ops.dispatch.deterministic = options.deterministic
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    num_blocks = max(blocks_needed(case, options.block_size) for case in options.cases)
    dtype = getattr(torch, options.data_type)
    stack = Stack(Shape(), dtype, FORMS[options.form], options.quantize_head)
    order = torch.randperm(num_blocks).tolist() if options.fragmented else list(range(num_blocks))
    columns = ["step", "quiet", "linear", "head", "attention", "rope", "norm", "activation", "build"]
    print(f"{options.data_type}, linear layers {options.form}, blocks of {options.block_size}, {options.threads} threads, ms")
    print(f"{'case':>10}{'cache':>6}" + "".join(f"{name:>12}" for name in columns))
    with torch.inference_mode():
        for case, cache in itertools.product(options.cases, options.kv_cache_dtype):
            stack.use_caches(CACHE_TYPES.get(cache, dtype), num_blocks, options.block_size)
            spent = measure(stack, case, options.block_size, order, options.seconds)
            print(f"{case:>10}{cache:>6}" + "".join(f"{spent.get(name, 0.0):12.2f}" for name in columns), flush=True)


if __name__ == "__main__":
    main()
