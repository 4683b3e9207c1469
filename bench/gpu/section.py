"""One section in a process of its own: `python -m bench.gpu.section NAME --rows FILE --seconds N`.

A kernel that corrupts the device's state, or a library that keeps its memory, then harms no other section. Rows are appended to
the file as they are found.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.section", description="Measures one section; see bench.gpu.")
    parser.add_argument("name", choices=("kernels", "engine", "peer", "quantized", "vlm", "demo"))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--demo", type=Path)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds

    def emit(row: dict[str, Any]) -> None:
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)

    try:
        find_section(arguments)(emit, deadline=deadline, toy=arguments.toy)
    except ModuleNotFoundError as error:
        emit({"section": arguments.name, "status": f"not measured: {error}"})
        return 1
    return 0


def find_section(arguments: argparse.Namespace) -> Callable[..., None]:
    """The section's function; imported now, for what it needs."""
    if arguments.name == "kernels":
        if arguments.toy:
            from bench.ops import interpreter

            interpreter.switch_on()
        from bench.gpu.kernels import run
    elif arguments.name == "engine":
        from bench.gpu.engine import run
    elif arguments.name == "peer":
        from bench.gpu.peer import run
    elif arguments.name == "quantized":
        from bench.gpu.quantized import run
    elif arguments.name == "vlm":
        from bench.gpu.vlm import run
    else:
        from bench.gpu import demo

        return partial(demo.run, file=arguments.demo)
    return run


def describe(row: dict[str, Any]) -> str:
    """A line of progress."""
    parts = [str(row[key]) for key in ("section", "quant_type", "op", "model", "shape", "batch") if key in row]
    if (status := row.get("status", "ok")) != "ok":
        return f"{' '.join(parts)}: {status}"
    figures = [
        f"{key} {row[key]:.4g}" for key in row if isinstance(row[key], int | float) and key not in ("batch", "bytes", "flops")
    ]
    return f"{' '.join(parts)}: {', '.join(figures)}"


if __name__ == "__main__":
    sys.exit(main())
