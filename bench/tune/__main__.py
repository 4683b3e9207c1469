"""`python -m bench.tune`: measures launch parameters on the GPU at hand, and writes its table for `dashinfer_kernels`."""

import argparse
import sys
import time
from pathlib import Path

import torch


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Measures candidate launch parameters of each op, and keeps the fastest."
    )
    add = parser.add_argument
    add("--op", action="append", metavar="NAME", help="this op alone; repeatable (default: all)")
    add("--minutes", type=float, default=8.0, metavar="N", help="end within this time; each key gets its share (8)")
    add("--out", type=Path, metavar="FILE.json", help="the table (default: that of this GPU in dashinfer_kernels/configs)")
    add("--dry-run", action="store_true", help="two candidates an op at toy sizes, under the interpreter; writes --out alone")
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.minutes * 60
    if arguments.dry_run:
        from bench.ops import interpreter

        interpreter.switch_on()
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --dry-run tries everything on CPU")

    from bench.ops.case import find_place
    from bench.tune import table
    from bench.tune.search import group_by_key, search
    from bench.tune.spaces import SPACES
    from dashinfer_kernels import tuning

    if unknown := set(arguments.op or ()) - set(SPACES):
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(SPACES)}")
    place = find_place(toy=arguments.dry_run)
    out = arguments.out
    if out is None and not arguments.dry_run:
        out = tuning.config_path(torch.cuda.get_device_name())

    def report(line: str) -> None:
        print(line, flush=True)

    torch.manual_seed(0)
    work = []
    with torch.inference_mode():
        for name in arguments.op or SPACES:
            space, jobs = SPACES[name], SPACES[name].jobs(place)
            if arguments.dry_run:
                space, jobs = type(space)(space.op, space.jobs, space.candidates[:2]), jobs[:1]
            groups = group_by_key(space, jobs)
            if not groups:
                report(f"{name}: asks the table for nothing")
            work += [(space, key, group) for key, group in groups.items()]
        for index, (space, key, group) in enumerate(work):
            share = (end - time.monotonic()) / (len(work) - index)
            found = search(space, place, key, group, deadline=time.monotonic() + share, report=report)
            if out is not None:
                table.write(out, [found])
            verdict = "the heuristic's config stays" if found.config is None else f"{found.config}, {found.gain:.3f}x"
            report(f"{found.op} {found.key}: {verdict} ({found.tried} tried, {found.refused} refused)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
