"""Which decoders, and which steps of them, one compiled loop computes; see `loop`.

Measured (`bench/results/cpu-quantized-linear.md`): ms of SmolLM2-135M's layers in bfloat16 and its head, at 170 tokens
a sequence, on 2 cores.

| sequences | 1 | 4 | 8 | 16 | 32 |
|---|---|---|---|---|---|
| loop | 10 | 9.8 | 16 | 26 | 48 |
| ops | 18 | 18 | 26 | 35 | 55 |
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from threading import Thread
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import loops, threads
from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.linear.cpu import BLOCK, PackedLinear
from dashinfer_kernels.linear.launch import Linear
from dashinfer_kernels.quant_matmul.cpu import BesideCopy
from dashinfer_kernels.quant_matmul.cpu_tiles import TILE, TileLinear, has_loops

MAX_ROWS = 16  # beyond, a step's time is that of its products
MAX_ROWS_PACKED = 32  # where all weights are in bfloat16

_PATIENCE = 0.5  # seconds to wait for a loop that was compiled before


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """A layer of a decoder: attention and a gated MLP with SiLU, each after an RMS norm and with a residual connection.

    Attributes:
        input_norm: [hidden] float32, and so is `mlp_norm`.
        window: tokens that a token sees; None: all.
    """

    input_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class DecodeLayers:
    """All layers of a decoder, and the norm after them, for sequences of one token each.

    Args:
        final_norm: [hidden] float32.
        cos_sin: [max_positions, rotary_dim] float32.
        eps: of all norms.
        scale: of scores.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        final_norm: Tensor,
        cos_sin: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        self._compiling, self._layers, self._final_norm, self._cos_sin = compiling(), layers, final_norm, cos_sin
        self._linears = [[_few_rows(each) for each in _linears(layer)] for layer in layers]
        self._heads, self._scalars = (num_heads, num_kv_heads, head_dim), (scale, eps)
        self._most_rows = min(_most_rows(linear) for layer in layers for linear in _linears(layer))
        self._intermediate = layers[0].down.in_features
        self._biases = [[_wide_bias(linear) for linear in each] for each in self._linears]
        found = [linear for each in self._linears for linear in each if isinstance(linear, TileLinear)]
        self._most_groups = max((linear.tiles.shape[1] for linear in found), default=1)
        self._calls = [threads.address(name) for name in ("omp_get_num_threads", "omp_get_thread_num", "sched_yield")]
        self._caches: list[Tensor] = []
        self._table = torch.empty(0)

    def takes(self, batch: PagedBatch, positions: Tensor, caches: Sequence[Tensor]) -> bool:
        """Whether the step is one of these."""
        few = self._compiling.loop is not None and batch.num_decodes == batch.num_tokens <= self._most_rows
        return (
            few and positions.ndim == 1 and caches[0].dtype == torch.bfloat16 and loops.take(torch.bfloat16, batch.num_tokens)
        )

    def __call__(self, embedded: Tensor, batch: PagedBatch, positions: Tensor, caches: Sequence[Tensor]) -> Tensor:
        """[tokens, hidden] bfloat16 after the final norm, of [tokens, hidden] float32; keys and values go to the caches.

        Args:
            positions: [tokens] int64, that queries and keys are rotated by.
            caches: of each layer, as of `rope_kv_write`, in bfloat16.

        Raises:
            IndexError: a position, slot or block outside of its table.
        """
        loop = self._compiling.loop
        assert loop is not None
        rows, hidden = embedded.shape
        num_heads, num_kv_heads, head_dim = self._heads
        num_blocks, _, _, block_size, _ = caches[0].shape
        out = torch.empty(rows, hidden, dtype=torch.bfloat16)
        qkv = torch.empty(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16)
        attended = torch.empty(rows, num_heads * head_dim, dtype=torch.bfloat16)
        added, activated = torch.zeros_like(out), torch.empty(rows, self._intermediate, dtype=torch.bfloat16)
        shares = torch.get_num_threads()
        tasks = torch.zeros((len(caches) * loop.PHASES * shares + 1) * loop.LINE, dtype=torch.uint8)
        tensors = [self._of(caches, loop), tasks, embedded, out, positions, batch.slot_mapping, batch.block_tables]
        tensors += [batch.context_lengths, self._cos_sin, self._final_norm, qkv, attended, added, activated]
        places = self._scratch(rows, hidden, batch.block_tables.shape[1] * block_size, loop.LINE)
        scratch = torch.empty(shares * places[-1], dtype=torch.uint8)
        failed = loop.decode(
            len(caches),
            1 << 30,
            *(each.data_ptr() for each in tensors),
            *(scratch.data_ptr() + place for place in places[:-1]),
            places[-1],
            *self._calls,
            rows,
            hidden,
            *self._heads,
            self._intermediate,
            *self._cos_sin.shape,
            num_blocks,
            block_size,
            batch.block_tables.shape[1],
            self._most_groups,
            *map(loop.float_bits, self._scalars),
            shares,
        )
        if failed:
            raise IndexError(f"sequence {failed - 1} has a position, a slot or a block outside of its table")
        return out

    def _scratch(self, rows: int, hidden: int, tokens: int, line: int) -> list[int]:
        """Where in a thread's own memory begin its residual stream, that normed, the sums of groups, products of tiles, gates
        and what they are for, two arrays of heads, and their scores; and how much memory that is. Threads share no line."""
        num_heads, num_kv_heads, head_dim = self._heads
        shared = num_heads // num_kv_heads
        stream, sums, products, sides = 4 * rows * hidden, 4 * rows * self._most_groups, 8 * rows * BLOCK, 4 * TILE
        sizes = (stream, stream // 2, sums, products, sides, 8 * shared * head_dim, 4 * shared * tokens + 2 * line)
        return list(accumulate((-(-size // line) * line for size in sizes), initial=0))

    def _of(self, caches: Sequence[Tensor], loop: ModuleType) -> Tensor:
        """The loop's numbers of each layer: [layers, numbers] int64."""
        if len(self._caches) != len(caches) or any(old is not new for old, new in zip(self._caches, caches, strict=True)):
            self._caches = list(caches)
            rows = []
            for layer, linears, biases, cache in zip(self._layers, self._linears, self._biases, caches, strict=True):
                of_linears = zip(linears, biases, strict=True)
                numbers = [number for linear, bias in of_linears for number in _numbers(linear, bias, loop.WIDE)]
                addresses = [each.data_ptr() for each in (layer.input_norm, layer.mlp_norm, cache)]
                rows.append([*numbers, *addresses, 1 << 40 if layer.window is None else layer.window])
            self._table = torch.tensor(rows)
        return self._table


def can_decode(layers: Sequence[LayerParts]) -> bool:
    """Whether the loop knows all of the layers' weights."""
    for layer in layers:
        if isinstance(layer.gate_up, PackedLinear) and layer.gate_up.out_features % (2 * BLOCK):
            return False
        for linear in _linears(layer):
            found = _few_rows(linear)
            if found is None or found.out_features % (2 * TILE):
                return False
    return bool(layers)


def _linears(layer: LayerParts) -> tuple[Linear, Linear, Linear, Linear]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _few_rows(linear: Linear) -> TileLinear | PackedLinear | None:
    """What the loop multiplies few rows with."""
    if isinstance(linear, PackedLinear):
        return linear if has_loops(linear.dtype) and linear.blocks is not None else None
    narrow = linear.narrow if isinstance(linear, BesideCopy) else linear
    return narrow if isinstance(narrow, TileLinear) and narrow.in_order else None


def _most_rows(linear: Linear) -> int:
    if isinstance(linear, BesideCopy):
        return linear.narrow.most_rows_beside_copy
    return MAX_ROWS_PACKED if isinstance(linear, PackedLinear) else MAX_ROWS


def _wide_bias(linear: TileLinear | PackedLinear) -> Tensor | None:
    """[outputs] float32."""
    if isinstance(linear, TileLinear):
        return linear.wide_bias
    return None if linear.bias is None else linear.bias.float()


def _numbers(linear: TileLinear | PackedLinear, bias: Tensor | None, wide: int) -> tuple[int, ...]:
    if isinstance(linear, TileLinear):
        tiles, groups, planes = linear.tiles.data_ptr(), linear.tiles.shape[1], linear.planes
    else:
        tiles, groups, planes = linear.blocks, 1, wide
    return tiles, 0 if bias is None else bias.data_ptr(), groups, planes, linear.in_features, linear.out_features


class _Compiling(Thread):
    """Has the loop compiled, which takes seconds in the first process of an installation and 20 ms in any later one. Steps do
    without it meanwhile."""

    loop: ModuleType | None = None

    def run(self) -> None:
        try:
            from dashinfer_kernels.decode_layers import loop
        # as in `loops.compile_all`
        except Exception as error:
            warnings.warn(f"Numba cannot compile all layers, so steps take longer: {error!r}", RuntimeWarning, stacklevel=2)
        else:
            self.loop = loop


@cache
def compiling() -> _Compiling:
    """Under way or done."""
    thread = _Compiling(daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return thread
