"""`python -m dashinfer.bench`: the same as `dashinfer_bench`."""

from dashinfer.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
