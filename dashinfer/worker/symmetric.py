"""Sums of small tensors over the GPUs of one machine: each reads the others' memory, in one kernel instead of a ring of copies.

Torch's symmetric memory does the work. Whether it does so on this machine is tried out; where not, NCCL sums as ever.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 512 << 10  # of a tensor; beyond, a ring reads each number fewer times

logger = logging.getLogger("dashinfer.worker")


class SmallSums:
    """The sum over a process group of tensors of one type, up to `MAX_BYTES`, on all ranks, at a time."""

    def __init__(self, ranks: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        """Raises RuntimeError where there is no such memory. All ranks come here together."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self._buffer = symmetric_memory.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric_memory.rendezvous(self._buffer, ranks)
        self._name = ranks.group_name

    def take(self, x: Tensor) -> bool:
        """Whether this tensor can be summed here: the kernel reads 16 bytes at a time."""
        return x.dtype == self._buffer.dtype and x.nbytes <= MAX_BYTES and x.nbytes % 16 == 0 and x.is_contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor with the sum of all ranks' `x`, which `take` accepts."""
        flat = x.view(-1)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(self._buffer[: len(flat)], flat, "sum", self._name).view(x.shape)


def small_sums(ranks: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> SmallSums | None:
    """What sums small tensors faster than NCCL, if it sums right on every rank of this machine; the ranks agree on that."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    others = [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if index != device.index]
    sums = None
    if all_can(all(torch.cuda.can_device_access_peer(device, other) for other in others), ranks):
        try:
            sums = SmallSums(ranks, dtype, device)
            x = (torch.arange(64, device=device) % 8).to(dtype)  # so small that no type rounds the sums
            right = torch.equal(sums(x + rank), x * size + size * (size - 1) // 2)
        except (RuntimeError, AttributeError, ImportError) as error:
            logger.info("GPUs do not read each other's memory: %s", error)
            right = False
        if not all_can(right, ranks):
            sums = None
    return sums


def all_can(works: bool, ranks: dist.ProcessGroup) -> bool:
    """Whether it works on all ranks, which ask together."""
    found = torch.tensor([int(works)])
    dist.all_reduce(found, dist.ReduceOp.MIN, group=ranks)
    return bool(found.item())
