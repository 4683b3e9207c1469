"""Layers that are split over the ranks of a tensor-parallel group, after Megatron (arXiv 1909.08053).

Column-parallel layers give each rank some output features, row-parallel ones some input features and a sum over the ranks; a
block of the two needs that one sum only. Each layer's `load` reads this rank's share of its weights and nothing else. With one
rank nothing is communicated. Knows nothing of the models that are built from it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from dashinfer.models.linears import load_linear, pack_weight
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import Linear, QuantizedRows, pack_linear, pack_quantized, quantize_int
from dashinfer_kernels.quant_matmul.reference import Activations


class SmallSum(Protocol):
    """Sums tensors over a group's ranks, all of which take the same ones."""

    def take(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class HostMemory(Protocol):
    """Does the group's operations on host tensors, for ranks of one machine; sums are in the order of the ranks."""

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def gather(self, x: Tensor) -> Tensor | None: ...

    def broadcast(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Group:
    """This rank's place among those that hold one model, or one stage of a pipeline, together. Whoever starts the ranks has set
    up torch.distributed.

    Attributes:
        ranks: torch.distributed's group of these ranks; None: its default one.
        ordered: sum in the order of the ranks, so that the bits of a sum do not depend on its place in a tensor.
        small: what sums the tensors faster that it takes; None: nothing does.
        memory: what takes the place of torch.distributed, where all tensors are host tensors; None: nothing does.
    """

    rank: int = 0
    world_size: int = 1
    ranks: torch.distributed.ProcessGroup | None = None
    ordered: bool = False
    small: SmallSum | None = None
    memory: HostMemory | None = None

    def share(self, size: int) -> tuple[int, int]:
        """This rank's [start, stop) of `size` things, which must be a multiple of the world size."""
        assert size % self.world_size == 0, f"{size} over {self.world_size} ranks"
        step = size // self.world_size
        return self.rank * step, (self.rank + 1) * step

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten."""
        if self.memory is not None:
            return self.memory.all_reduce(x)
        if self.small is not None and self.small.take(x):
            return self.small(x)
        if not self.ordered:
            torch.distributed.all_reduce(x, group=self.ranks)
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, x, group=self.ranks)
        x.copy_(parts[0])
        for part in parts[1:]:
            x += part
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        """All ranks' x [rows, columns] side by side on rank 0: [rows, world size * columns]; None on the others."""
        if self.memory is not None:
            return self.memory.gather(x)
        parts = [torch.empty_like(x) for _ in range(self.world_size)] if self.rank == 0 else None
        torch.distributed.gather(x, parts, group_dst=0, group=self.ranks)
        return None if parts is None else torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in place."""
        if self.memory is not None:
            return self.memory.broadcast(x)
        torch.distributed.broadcast(x, group_src=0, group=self.ranks)
        return x


@dataclass(frozen=True)
class HeadShare:
    """The heads of a rank: queries [start, stop) and the key-value heads [kv_start, kv_stop) that they use, evenly."""

    start: int
    stop: int
    kv_start: int
    kv_stop: int

    @property
    def num_heads(self) -> int:
        return self.stop - self.start

    @property
    def num_kv_heads(self) -> int:
        return self.kv_stop - self.kv_start


def share_heads(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> HeadShare:
    """What a rank has of the heads, which need not be a multiple of the world size.

    Up to as many ranks as key-value heads have whole ones with all their queries, some one more where they do not divide. Where
    ranks are more, neighbours have a copy of the same one, and a part of its queries each.
    """
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        first, last = (each * num_kv_heads // world_size for each in (rank, rank + 1))
        return HeadShare(first * group, last * group, first, last)
    kv_head = next(each for each in range(num_kv_heads) if rank < (each + 1) * world_size // num_kv_heads)
    begin, end = (each * world_size // num_kv_heads for each in (kv_head, kv_head + 1))
    first, last = (kv_head * group + each * group // (end - begin) for each in (rank - begin, rank - begin + 1))
    assert first < last, f"{num_heads} heads, {num_kv_heads} of keys and values, over {world_size} ranks"
    return HeadShare(first, last, kv_head, kv_head + 1)


class ColumnParallelLinear:
    """x [tokens, in] -> [tokens, this rank's outputs]. Several matrices with the same input are computed as one."""

    def __init__(self, linear: Linear) -> None:
        self.linear = linear

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        return self.linear(x)

    @property
    def takes(self) -> Activations | None:
        """What its inputs should be quantised to by whatever makes them."""
        return self.linear.takes

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


class QKVLinear(ColumnParallelLinear):
    """Queries, keys and values: x [tokens, hidden] -> [tokens, (heads + 2 * kv heads of the rank) * head_dim].

    Which heads those are is the matter of `share_heads`.
    """

    @classmethod
    def load(
        cls,
        reader: WeightReader,
        prefix: str,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        group: Group,
    ) -> "QKVLinear":
        """From `{prefix}q_proj`, `k_proj` and `v_proj`."""
        share = share_heads(heads, kv_heads, group.rank, group.world_size)
        kv_rows = (share.kv_start * head_dim, share.kv_stop * head_dim)
        q_rows = (share.start * head_dim, share.stop * head_dim)
        parts = [Part(f"{prefix}q_proj.weight", (heads * head_dim, hidden), q_rows)]
        parts += [Part(f"{prefix}{name}_proj.weight", (kv_heads * head_dim, hidden), kv_rows) for name in "kv"]
        return cls(load_linear(reader, parts, bias=bias))


class GateUpLinear(ColumnParallelLinear):
    """The two inputs of a gated MLP: x [tokens, hidden] -> [tokens, 2 * intermediate of the rank], the gate first."""

    @classmethod
    def load(
        cls, reader: WeightReader, prefix: str, hidden: int, intermediate: int, *, bias: bool, group: Group
    ) -> "GateUpLinear":
        """From `{prefix}gate_proj` and `up_proj`."""
        names = (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight")
        parts = [Part(name, (intermediate, hidden), group.share(intermediate)) for name in names]
        return cls(load_linear(reader, parts, bias=bias))


class RowParallelLinear:
    """x [tokens, this rank's inputs] -> [tokens, out], summed over the ranks.

    On CPU the sum is made in float32, and is; on GPUs, where long prompts wait for the links, it has the type of `x`.
    """

    def __init__(self, linear: Linear, group: Group) -> None:
        self.linear = linear
        self.group = group
        self.reduce = group.world_size > 1

    @classmethod
    def load(
        cls,
        reader: WeightReader,
        prefix: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        share: tuple[int, int] | None = None,
    ) -> "RowParallelLinear":
        """From `{prefix}weight` and, with `bias`, `{prefix}bias`.

        Args:
            share: this rank's [start, stop) of the inputs; None: as many as any other's.
        """
        columns = (share or group.share(in_features)) if group.world_size > 1 else None
        part = Part(f"{prefix}weight", (out_features, in_features), columns=columns)
        # the bias is part of the sum, so one rank adds it
        if bias and group.rank > 0:
            reader.skip(f"{prefix}bias")
        return cls(load_linear(reader, [part], bias=bias and group.rank == 0), group)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        if not self.reduce:
            return self.linear(x)
        on_cpu = (x if isinstance(x, Tensor) else x.values).device.type == "cpu"
        return self.group.all_reduce(self.linear.wide(x) if on_cpu else self.linear(x))

    @property
    def takes(self) -> Activations | None:
        """What its inputs should be quantised to by whatever makes them."""
        return self.linear.takes

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes


def _vocab_rows(vocab: int, group: Group) -> tuple[int, int]:
    rows = -(-vocab // group.world_size)
    return min(group.rank * rows, vocab), min((group.rank + 1) * rows, vocab)


def load_vocab_share(reader: WeightReader, name: str, vocab: int, hidden: int, group: Group) -> Tensor:
    """This rank's rows of an embedding or a head: [ceil(vocab / world size), hidden], zeros beyond the vocabulary."""
    start, stop = _vocab_rows(vocab, group)
    rows = -(-vocab // group.world_size)
    weight = reader.read(Part(name, (vocab, hidden), (start, stop)))
    return F.pad(weight, (0, 0, 0, rows - (stop - start))) if stop - start < rows else weight


class VocabParallelEmbedding:
    """Token ids [tokens] int64 -> [tokens, hidden]. `weight` is this rank's share of the rows."""

    def __init__(self, weight: Tensor, group: Group) -> None:
        self.weight = weight
        self.group = group
        self.start = group.rank * weight.shape[0]

    def __call__(self, ids: Tensor) -> Tensor:
        if self.group.world_size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        y = F.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.group.all_reduce(y.masked_fill_(elsewhere[:, None], 0))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


# Logits of 16-bit layers are rounded to 16 bits, those of 8-bit ones err more; those this close to the likeliest, as a share of
# it, may have changed places. (Of SmolLM2's likeliest token, 8 bits take 0.7% at most in 1,000 places of a text.)
_NEARLY_BEST = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
_NEARLY_BEST_OF_8_BITS = 2.0**-4
# Computed again at a time: a handful a row as a rule, but every token where all are equal.
_CANDIDATES = 4096


def _nearly_best(logits: Tensor, share: float) -> Tensor:
    """Row and token, [found, 2], of the logits less than `share` of a row's greatest below it.

    Looks at the maxima of blocks first: comparing and searching the whole vocabulary takes as long as a layer.
    """
    blocks = logits.view(logits.shape[0], -1, math.gcd(logits.shape[1], 64))
    peaks = blocks.amax(-1)
    best = peaks.amax(-1, keepdim=True)
    least = best - best.abs() * share
    rows, places = torch.nonzero(peaks >= least).unbind(1)
    found, inside = torch.nonzero(blocks[rows, places] >= least[rows]).unbind(1)
    return torch.stack((rows[found], places[found] * blocks.shape[2] + inside), 1)


class VocabParallelHead:
    """Hidden states [rows, hidden] -> logits [rows, vocab] float32 on rank 0 of the group, None on the others.

    Where products or weights are rounded, the likeliest tokens of a row often end up equal or in the wrong order. With `exact`,
    the weights as they are, [rows of this rank, hidden], the logits less than `share` of a row's greatest below it are computed
    again in float32.
    """

    def __init__(
        self,
        linear: Linear,
        vocab: int,
        group: Group,
        *,
        exact: Tensor | None = None,
        share: float | None = None,
        shared: bool = False,
    ) -> None:
        self.linear = linear
        self.shared = shared
        self.vocab = vocab
        self.group = group
        start, stop = _vocab_rows(vocab, group)
        self._beyond = linear.out_features - (stop - start)  # the vocabulary
        share = share or (None if exact is None else _NEARLY_BEST.get(exact.dtype))
        self.share, self.exact = share or 0.0, exact if share else None

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, vocab: int, hidden: int, group: Group, *, embedding: Tensor | None
    ) -> "VocabParallelHead":
        """From the tensor `name`, or from `embedding`, this rank's share of it, where that is the head's weight too.

        On a GPU a 16-bit head shares the embedding; on CPU, where linear layers keep weights in a layout of their own, it
        serves to compute the best logits exactly. Its inputs are then not rounded: they are few, and it was not asked for.
        """
        exact = embedding if reader.device.type == "cpu" else None
        form = reader.format
        if form is not None and form.rounds_head and exact is not None and exact.dtype in _NEARLY_BEST:
            codes = quantize_int(exact, bits=8, symmetric=True)
            linear = pack_quantized(codes, dtype=reader.dtype, wide_copy=form.wide_copy)
            return cls(linear, vocab, group, exact=exact, share=_NEARLY_BEST_OF_8_BITS)
        part = Part(name, (vocab, hidden), _vocab_rows(vocab, group))
        if form is not None and (codes := form.read_head(reader, part)) is not None:
            return cls(pack_weight(reader, codes.pad_rows(-(-vocab // group.world_size))), vocab, group)
        weight = embedding if embedding is not None else load_vocab_share(reader, name, vocab, hidden, group)
        return cls(pack_linear(weight), vocab, group, exact=exact, shared=embedding is not None and exact is None)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        logits = self.linear.wide(hidden)
        if self._beyond:
            logits[:, -self._beyond :] = -torch.inf  # which nothing is close to
        if self.exact is not None:
            close = _nearly_best(logits, self.share)
            for rows, tokens in (part.unbind(1) for part in close.split(_CANDIDATES)):
                logits[rows, tokens] = (self.exact[tokens].float() * hidden[rows].float()).sum(-1)
        if self.group.world_size == 1:
            return logits
        gathered = self.group.gather(logits.contiguous())
        return None if gathered is None else gathered[:, : self.vocab]

    @property
    def nbytes(self) -> int:
        """Of the layer's weights, unless they are the embedding's."""
        return 0 if self.shared else self.linear.nbytes
