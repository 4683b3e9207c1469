"""Sums, gathers and broadcasts of host tensors over ranks of one machine, without a message: each writes where all can read.

A rank writes its part and then the number of the operation, both with plain stores. On x86-64 other cores see them in that
order; no other machine is taken. Operations take turns with two slots a rank; a rank writes to one when all have begun the
operation after the one that it was last used for, and so have read it.

A rank that waits looks again and again for some microseconds, lets others have its core for a while, and then sleeps, ever
longer; a rank that has ended raises PeerLost in those that wait for it.
"""

import logging
import mmap
import os
import platform
import random
import select
import time
from collections.abc import Sequence
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from dashinfer.errors import PeerLost
from dashinfer.worker.symmetric import all_can

SLOT_BYTES = 1 << 20  # a larger tensor goes in pieces
SPINS = 200  # looks at another rank's number, some microseconds
YIELDS = 1e-3  # seconds of giving the core away between looks
MAX_SLEEP = 1e-3  # seconds
_STRIDE = 16  # numbers of 8 bytes between those of two ranks: they share no cache line, nor a pair of them
_HEADER = mmap.PAGESIZE  # bytes, of which the last number says whose memory it is

logger = logging.getLogger("dashinfer.worker")


class SharedMemory:
    """Operations on CPU tensors, contiguous or copied, that all ranks call in the same order with the same shapes and types.

    Args:
        memory: what all ranks map, `memory_bytes` long and zero at first.
        peers: of each rank, in order, a descriptor that can be read when it has ended (`pidfd_open`).
    """

    def __init__(self, memory: mmap.mmap, rank: int, peers: Sequence[int]) -> None:
        self._rank = rank
        self._size = len(peers)
        self._others = [each for each in range(len(peers)) if each != rank]
        self._peers = peers
        self._numbers = memoryview(memory)[:_HEADER].cast("q")
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8, offset=_HEADER).view(2, self._size, SLOT_BYTES)
        self._number = 0  # of operations that this rank has begun
        self._begun = 0  # that all are known to have begun
        self._parts = lru_cache(64)(self._make_parts)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in place if that is contiguous.

        It is made in the order of the ranks, in the type of `x`, so a number's bits do not depend on its place.
        """
        flat = x.reshape(-1)
        for piece in self._pieces(flat):
            first, second, *others = self._write(piece)
            self._wait(self._others)
            torch.add(first, second, out=piece)
            for part in others:
                piece += part
        return flat.view(x.shape)

    def gather(self, x: Tensor) -> Tensor | None:
        """All ranks' x [rows, columns] side by side on rank 0: [rows, ranks * columns]; None on the others."""
        rows, columns = x.shape
        whole = x.new_empty(rows, self._size, columns) if self._rank == 0 else None
        across = max(min(columns, SLOT_BYTES // x.itemsize), 1)
        down = max(SLOT_BYTES // (x.itemsize * across), 1)
        for row in range(0, rows, down):
            for column in range(0, columns, across):
                window = slice(row, row + down), slice(column, column + across)
                piece = x[window]
                if whole is None:
                    self._write(piece.reshape(-1))
                    continue
                parts = self._write(piece.reshape(-1), copy=False)
                whole[window[0], 0, window[1]] = piece
                for each in self._others:
                    self._wait([each])
                    whole[window[0], each, window[1]] = parts[each].view(piece.shape)
        return None if whole is None else whole.view(rows, -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in place if that is contiguous."""
        flat = x.reshape(-1)
        for piece in self._pieces(flat):
            parts = self._write(piece, copy=self._rank == 0)
            if self._rank > 0:
                self._wait([0])
                piece.copy_(parts[0])
        return flat.view(x.shape)

    def _pieces(self, flat: Tensor) -> Sequence[Tensor]:
        return (flat,) if flat.nbytes <= SLOT_BYTES else flat.split(SLOT_BYTES // flat.itemsize)

    def _write(self, piece: Tensor, *, copy: bool = True) -> list[Tensor]:
        """Begin an operation. Returns each rank's part; another's is there when that rank has begun it, too."""
        if self._begun < self._number:
            self._wait(self._others)
        self._number = number = self._number + 1
        parts = self._parts(number % 2, piece.dtype, piece.numel())
        if copy:
            parts[self._rank].copy_(piece)
        self._numbers[self._rank * _STRIDE] = number
        return parts

    def _make_parts(self, turn: int, dtype: torch.dtype, count: int) -> list[Tensor]:
        return [slot[: count * dtype.itemsize].view(dtype) for slot in self._bytes[turn]]

    def _wait(self, ranks: Sequence[int]) -> None:
        """Until these have begun the operation that this rank has begun last."""
        numbers, number = self._numbers, self._number
        for rank in ranks:
            place = rank * _STRIDE
            for _ in range(SPINS):
                if numbers[place] >= number:
                    break
            else:
                self._wait_long(rank)
        if len(ranks) == len(self._others):
            self._begun = number

    def _wait_long(self, rank: int) -> None:
        numbers, place, number = self._numbers, rank * _STRIDE, self._number
        since = time.monotonic()
        while numbers[place] < number:
            waited = time.monotonic() - since
            if waited < YIELDS:
                os.sched_yield()
                continue
            time.sleep(min(waited / 16, MAX_SLEEP))
            if self._ends[rank].poll(0) and numbers[place] < number:
                raise PeerLost(f"another rank is gone: rank {rank} has ended")

    @cached_property
    def _ends(self) -> list[select.poll]:
        polls = [select.poll() for _ in self._peers]
        for poll, peer in zip(polls, self._peers, strict=True):
            poll.register(peer, select.POLLIN)
        return polls


def memory_bytes(size: int) -> int:
    """Of the memory of so many ranks."""
    return _HEADER + 2 * size * SLOT_BYTES


def share_memory(ranks: dist.ProcessGroup) -> SharedMemory | None:
    """The memory of ranks that are all on this machine; None where one of them cannot have it, on which they agree.

    It is an anonymous file of rank 0, which the others open through /proc, so it goes with the last of them.
    """
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    fd, token = -1, random.SystemRandom().getrandbits(62)
    known = platform.machine().lower() in ("x86_64", "amd64") and (size + 1) * _STRIDE * 8 <= _HEADER
    if known and rank == 0:
        try:
            fd = os.memfd_create("dashinfer")
            os.ftruncate(fd, memory_bytes(size))
            os.pwrite(fd, token.to_bytes(8, "little"), _HEADER - 8)
        except (OSError, AttributeError) as error:
            logger.info("ranks share no memory: %s", error)
    mine = torch.tensor([os.getpid(), fd, token])
    told = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(told, mine, group=ranks)
    _, fd_of_first, token = told[0].tolist()
    shared = None
    if known and fd_of_first >= 0:
        pids = [int(each[0]) for each in told]
        try:
            shared = SharedMemory(
                _map(f"/proc/{pids[0]}/fd/{fd_of_first}", size, token),
                rank,
                [os.pidfd_open(pid) for pid in pids],
            )
        except (OSError, AttributeError, ValueError) as error:
            logger.info("ranks share no memory: %s", error)
    if not all_can(shared is not None, ranks):
        shared = None
    if fd >= 0:
        os.close(fd)
    return shared


def _map(path: str, size: int, token: int) -> mmap.mmap:
    """Raises OSError, ValueError."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(fd, memory_bytes(size))
    finally:
        os.close(fd)
    if int.from_bytes(memory[_HEADER - 8 : _HEADER], "little") != token:
        raise ValueError(f"{path} is another file")
    return memory
