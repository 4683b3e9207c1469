"""Launch parameters that a bench measured on this GPU.

One table a GPU, `configs/<gpu>.json`: for each op a list of `{"key": [...], "config": {...}}`. A table is read once; nothing is
tuned while serving. Where a table or a key is missing, the op's own heuristic decides. Knows nothing of what keys and configs
mean.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"


def lookup(op: str, key: tuple[int | str, ...]) -> dict[str, Any] | None:
    """The config measured for `key`, or None; the same dictionary every time, not to be changed.

    Args:
        op: the op's name in the table.
        key: what the config depends on; ints and strings, as the op's bench wrote them.

    Raises:
        ValueError: the GPU's table is not what the module's docstring says.
    """
    return _table(_device()).get(op, {}).get(key)


def config_path(device_name: str) -> Path:
    """Where the table of a GPU lies: `NVIDIA H200` has `configs/nvidia_h200.json`."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json")


@cache
def _device() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def _table(device_name: str | None) -> dict[str, dict[tuple[int | str, ...], dict[str, Any]]]:
    if device_name is None or not (path := config_path(device_name)).exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {op: {tuple(entry["key"]): dict(entry["config"]) for entry in entries} for op, entries in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tuning table: {error!r}") from error
