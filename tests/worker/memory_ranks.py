"""Ranks of tests: processes that share memory and compare what they find there with what torch makes of the same numbers.

`python -m tests.worker.memory_ranks RANK FOLDER` leaves in FOLDER/RANK what it found, as JSON.
"""

import json
import os
import platform
import random
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dashinfer.errors import PeerLost
from dashinfer.worker import shared_memory
from dashinfer.worker.shared_memory import SharedMemory, share_memory

WORLD_SIZE = 4
SIZES = (1, 575, 576 * 64, 300_001)  # numbers; the last is more than a slot takes
ROUNDS = 3000
TICK = 0.01  # seconds
SILENCE = 0.6  # seconds that a rank lets another one wait


class Hesitating(SharedMemory):
    """One that often comes late, and often reads late."""

    def _write(self, piece: Tensor, *, copy: bool = True) -> list[Tensor]:
        hesitate()
        return super()._write(piece, copy=copy)

    def _wait(self, ranks: Sequence[int]) -> None:
        super()._wait(ranks)
        hesitate()


def hesitate() -> None:
    match random.randrange(60):
        case 0:
            time.sleep(random.random() * 2e-4)
        case 1 | 2 | 3:
            for _ in range(random.randrange(200)):
                pass


class Group:
    """Ranks that share memory, and the numbers of each that all of them know."""

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(ranks), dist.get_world_size(ranks)
        shared = share_memory(ranks)
        assert shared is not None
        self.shared = shared
        generator = torch.Generator().manual_seed(7)
        self.numbers = torch.randn(self.size, SIZES[-1] + 1000, generator=generator)
        self.choices = random.Random(7)  # the same on all ranks

    def parts(self, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        start = self.choices.randrange(1000)
        return [each[start : start + size].to(dtype, copy=True) for each in self.numbers]

    def sums(self, size: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether the sum has the bits of one in the order of the ranks."""
        parts = self.parts(size, dtype)
        mine = parts[self.rank].clone()
        found = self.shared.all_reduce(mine)
        expected = parts[0]
        for part in parts[1:]:
            expected = expected + part
        return torch.equal(found, expected) and found.data_ptr() == mine.data_ptr()

    def gathers(self, rows: int, columns: int) -> bool:
        parts = [part.view(columns, rows).T for part in self.parts(rows * columns)]  # not contiguous
        found = self.shared.gather(parts[self.rank])
        return found is None if self.rank else found is not None and torch.equal(found, torch.cat(parts, -1))

    def broadcasts(self, size: int) -> bool:
        parts = [part.mul_(100).long() for part in self.parts(size)]
        return torch.equal(self.shared.broadcast(parts[self.rank]), parts[0])

    def any_operation(self) -> bool:
        match self.choices.randrange(8):
            case 0:
                return self.gathers(self.choices.randrange(1, 9), self.choices.randrange(1, 99))
            case 1:
                return self.broadcasts(self.choices.randrange(1, 9))
        return self.sums(self.choices.choice((1, 16, 576)))


def agrees_that_there_is_none(rank: int) -> bool:
    """One rank is on a machine of another kind."""
    machine = platform.machine
    if rank == 1:
        platform.machine = lambda: "aarch64"
    found = share_memory(dist.group.WORLD)
    platform.machine = machine
    return found is None


def wait_for_a_silent_rank(group: Group) -> dict[str, float]:
    """Rank 1 is silent for a while and then ends; what the others see."""
    group.sums(1)
    if group.rank == 1:
        time.sleep(SILENCE)
        group.sums(1)
        os.kill(os.getpid(), signal.SIGKILL)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(TICK):
            ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    busy = time.process_time()
    group.sums(1)
    busy = time.process_time() - busy
    stop.set()
    ticker.join()
    lost = ""
    try:
        group.sums(1)
    except PeerLost as error:
        lost = str(error)
    return {"ticks": ticks, "busy": busy, "lost": lost}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    random.seed(rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    found = {"none": agrees_that_there_is_none(rank)}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    shared_memory.SharedMemory = Hesitating
    with torch.inference_mode():
        for ranks in (pairs[rank // 2], dist.group.WORLD):
            group = Group(ranks)
            found[f"sums {group.size}"] = [group.sums(size) for size in SIZES]
            found[f"bfloat16 {group.size}"] = group.sums(575, torch.bfloat16)
            found[f"gathers {group.size}"] = [group.gathers(3, 7), group.gathers(2, 100_000), group.gathers(1, 300_000)]
            found[f"broadcasts {group.size}"] = [group.broadcasts(size) for size in (1, 140_000)]
            found[f"rounds {group.size}"] = sum(group.any_operation() for _ in range(ROUNDS))
        dist.barrier()
        (folder / str(rank)).write_text(json.dumps(found))
        if rank < 2:
            found |= wait_for_a_silent_rank(Group(pairs[0]))
    (folder / str(rank)).write_text(json.dumps(found))
    os._exit(0)  # a rank that was killed cannot say good-bye to gloo


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
