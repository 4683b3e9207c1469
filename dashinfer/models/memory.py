"""How much memory a model's weights need, and how much the machine has left for them. Knows no torch."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from dashinfer.errors import InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.models.shapes import ALL, EMBEDDING, tensor_shapes
from dashinfer.models.stage import Stage


def weight_bytes(
    config: ModelConfig,
    itemsize: int,
    world_size: int,
    *,
    stage: Stage = ALL,
    tied_copies: int = 1,
    layer_bits: float | None = None,
    packed: Mapping[str, int] | None = None,
) -> int:
    """Bytes of one rank's share of the weights, within a few percent for more than one rank; heads count as if they divided.

    Args:
        itemsize: bytes that a linear layer keeps for a weight.
        world_size: ranks of a stage.
        tied_copies: of an embedding that is the head too; 2 where linear layers keep weights in a layout of their own.
        layer_bits: that a weight of the layers' matrices takes with its share of a scale, where they are rounded on load.
        packed: the matrices that the checkpoint has quantised, by name, and their bytes.
    """
    packed = packed or {}
    shapes = tensor_shapes(config, stage)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name not in packed)
    if config.tie_word_embeddings and stage.last:
        weights += (tied_copies - 1) * math.prod(shapes[EMBEDDING])
    needed = itemsize * weights + sum(packed.values())
    if layer_bits is not None:
        layers = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("_proj.weight"))
        needed += math.ceil(layers * (layer_bits / 8 - itemsize))
    return -(-needed // world_size)


def packed_bytes(config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """The matrices that a checkpoint has quantised, and the bytes that each takes: those of all its tensors in the files, and
    no fewer than 4 bits a weight, which devices use for fewer ones, too.

    Args:
        sizes: of the tensors in the files, in bytes.
    """
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        module, _, kind = name.rpartition(".")
        if kind != "bias":
            modules[module] = modules.get(module, 0) + size
    return {
        name: max(modules[name.removesuffix(".weight")], math.prod(shape) // 2)
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and sizes.get(name, 0) < 2 * math.prod(shape) and name.removesuffix(".weight") in modules
    }


def check_memory(name: str, needed: int, available: int, kind: str, where: str) -> None:
    """Raises InsufficientMemory, saying what to change, if `needed` bytes are more than the `available` ones.

    Args:
        kind: what the weights are kept in, a data type or a quantisation.
    """
    if needed <= available:
        return
    changes = {"bfloat16": "--quant-type a16w8 or a16w4, ", "float16": "--quant-type a16w8 or a16w4, "}
    changes |= dict.fromkeys(("a16w8", "a8w8", "fp8"), "--quant-type a16w4, ")
    smaller = changes.get(kind, "--data-type bfloat16, " if kind == "float32" else "")
    raise InsufficientMemory(
        f"{name}: the weights need {format_size(needed)} in {kind}, but only {format_size(available)} of {where} is free; "
        f"use {smaller}a smaller model, or free some memory"
    )


def format_size(count: int) -> str:
    """For messages: `1.5 GiB`, or `300 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process can still take, within the limits of the container it may run in."""
    free = _physical(proc)
    for limit, used in _limits(proc, cgroups):
        free = min(free, max(0, limit - used))
    return free


def _physical(proc: Path) -> int:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:  # not Linux: the whole of it is the best there is to know
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes.get("MemAvailable", sizes.get("MemFree", 0))


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, in use) in bytes of every control group around this process that has a limit; caches that can be dropped at any
    time do not count as in use."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # seen from inside of a container the path may name a folder outside of it: the container's own is then the root
        for folder in (group, *group.parents):
            limit, used = _read_int(folder / names[0]), _read_int(folder / names[1])
            if limit is not None and used is not None:
                yield limit, used - _droppable(folder / "memory.stat", names[2])
            if folder == root:
                break


def _read_int(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _droppable(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
