"""The ranks that hold one model together: how they meet, what they agree on, and which errors are another rank's end.

NCCL carries tensors on GPUs; host tensors go by gloo or, on one machine, through memory that ranks share. Nothing here waits
less than a day for another rank: the parent watches all of them, and ends the group when one is lost.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dashinfer.errors import ConfigurationError, PeerLost
from dashinfer.models.parallel import Group
from dashinfer.models.stage import Stage
from dashinfer.types import WorkerConfig
from dashinfer.worker.pipeline import Pipeline
from dashinfer.worker.shared_memory import share_memory
from dashinfer.worker.symmetric import small_sums

PATIENCE = timedelta(days=1)
# What gloo and NCCL say when the other end of a connection is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "remote process exited")


@dataclass(frozen=True)
class World:
    """All ranks of a model.

    Attributes:
        group: the tensor-parallel group that this rank is in.
        ranks: torch.distributed's group of all ranks; None: torch's default one.
        size: how many ranks there are.
        pipeline: to other stages; None: there is one stage.
    """

    group: Group
    ranks: dist.ProcessGroup | None = None
    size: int = 1
    pipeline: Pipeline | None = None

    @property
    def stage(self) -> Stage:
        """Of the pipeline, that this rank is in."""
        return Stage() if self.pipeline is None else self.pipeline.stage

    def least(self, *values: int) -> list[int]:
        """The least that any rank has of each of these; no rank goes on before all have come here."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.ranks)
        return found.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.least(0)


def join(config: WorkerConfig, device: torch.device) -> World:
    """Meet the other ranks at `config.rendezvous`.

    Ranks `i * n` to `(i + 1) * n - 1`, n being the tensor-parallel size, are one tensor-parallel group and one stage of the
    pipeline.

    Raises:
        ConfigurationError: there is no such network interface.
        PeerLost: another rank ended meanwhile.
    """
    size = config.world_size
    if size == 1:
        return World(Group())
    os.environ["GLOO_SOCKET_IFNAME"] = config.interface
    os.environ["NCCL_SOCKET_IFNAME"] = f"={config.interface}"  # that one, and not all whose names begin so
    on_gpu = device.type == "cuda"
    try:
        with peers_may_end():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                init_method=config.rendezvous,
                rank=config.rank,
                world_size=size,
                timeout=PATIENCE,
                device_id=device if on_gpu else None,
            )
            world = make_world(config, device)
            world.wait()
    except RuntimeError as error:
        if "Unable to find address" in str(error):
            raise ConfigurationError(
                f"this machine has no network interface {config.interface!r} with an address; name another one with "
                "--cluster-interface"
            ) from None
        raise
    return world


def make_world(config: WorkerConfig, device: torch.device, ranks: dist.ProcessGroup | None = None) -> World:
    """What `config.rank` sees of the ranks that have met; all of those call this at once.

    Args:
        ranks: torch.distributed's group of the first `config.world_size` ranks, which are the model's; None: they are all.
    """
    return World(_tensor_group(config, device, ranks), ranks, config.world_size, _pipeline(config))


def _tensor_group(config: WorkerConfig, device: torch.device, ranks: dist.ProcessGroup | None) -> Group:
    size = _stage_size(config)
    if config.pipeline_parallel > 1 and size > 1:
        ranks = _make_groups(config.rank, [list(range(first, first + size)) for first in range(0, config.world_size, size)])
    # in a ring, and so with more than two ranks, a number's place in a tensor decides in which order it is summed
    ordered = config.deterministic and size > 2
    small = None
    if device.type == "cuda" and size > 1 and config.world_size <= config.local_size and not config.deterministic:
        small = small_sums(ranks or dist.group.WORLD, getattr(torch, config.data_type), device)
    memory = None
    if device.type == "cpu" and size > 1 and config.rendezvous.startswith("file://"):  # all on this machine
        memory = share_memory(ranks or dist.group.WORLD)
    return Group(config.rank % size, size, ranks, ordered, small, memory)


def _pipeline(config: WorkerConfig) -> Pipeline | None:
    if config.pipeline_parallel == 1:
        return None
    size, count = _stage_size(config), config.pipeline_parallel

    def pair(one: int, other: int) -> dist.ProcessGroup | None:
        pairs = [[stage * size + place for stage in (one, other)] for place in range(size)]
        return _make_groups(config.rank, pairs)

    stage = Stage(config.rank // size, count)
    links = {each: pair(each, each + 1) for each in range(count - 1)}
    return Pipeline(stage, before=links.get(stage.index - 1), after=links.get(stage.index), ends=pair(0, count - 1))


def _stage_size(config: WorkerConfig) -> int:
    size = config.world_size // config.pipeline_parallel
    assert size * config.pipeline_parallel == config.world_size
    return size


def _make_groups(rank: int, groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Makes all of these groups, in which every rank has a part, and returns the one that `rank` is in."""
    made = [(ranks, dist.new_group(ranks, timeout=PATIENCE)) for ranks in groups]
    return next((group for ranks, group in made if rank in ranks), None)


def select_device(name: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The device of a rank among the `local_size` ranks of its machine; a GPU becomes torch's current device.

    Raises:
        ConfigurationError: CUDA is asked for and not there, or there are fewer GPUs than ranks.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigurationError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    if (found := torch.cuda.device_count()) < local_size:
        raise ConfigurationError(
            f"{local_size} ranks on this machine need a GPU each, and it has {found} ({torch.cuda.get_device_name(0)}); "
            f"split the model over {found}, or use --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def peers_may_end() -> Iterator[None]:
    """Turns the error of an operation that another rank did not live to take part in into a PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in _LOST):
            raise
        raise PeerLost(f"another rank is gone: {str(error).splitlines()[0]}") from error
