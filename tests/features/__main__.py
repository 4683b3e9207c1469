"""`python -m tests.features README.md FILE`: writes the table that a run's file gives into a text, or compares the two."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import table
from .catalogue import CATALOGUE
from .run import read, stored_gpu_runs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.features", description="README's table of features.")
    add = parser.add_argument
    add("text", type=Path, metavar="README.md", help=f"has the lines {table.BEGIN} and {table.END}, around the table")
    add("run", type=Path, metavar="FILE", help="what `python -m pytest --features FILE` wrote on a machine without a GPU")
    add("--gpu", type=Path, action="append", metavar="FILE", default=[],
        help="what a run on a GPU wrote, besides bench/results/gpu-*.features.json; may be repeated")  # fmt: skip
    add("--check", action="store_true", help="write nothing; status 1 if the text's table is another one")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        text = options.text.read_text(encoding="utf-8")
        run = read(options.run)
        given = {path: read(path) for path in options.gpu}
        if run.gpu:
            raise ValueError(f"{options.run} is of a run on {run.gpu}: give it with --gpu")
        for path, gpu_run in given.items():
            if not gpu_run.gpu:
                raise ValueError(f"no test of {path} ran on a GPU")
        proven = table.rows(CATALOGUE, run, [*stored_gpu_runs(options.text.absolute().parent), *given.values()])
        written = table.replace(text, table.as_markdown(proven))
        if not options.check:
            options.text.write_text(written, encoding="utf-8")
            return 0
        claimed = table.parse(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    more, less = table.excess(claimed, proven), table.excess(proven, claimed)
    for name in more:
        print(f"claims more: {name}", file=sys.stderr)
    for name in less:
        print(f"claims less: {name}", file=sys.stderr)
    if written != text and not more and not less:
        print("the rows are right, their order or form is not", file=sys.stderr)
    return int(written != text)


if __name__ == "__main__":
    sys.exit(main())
