"""`python -m dashinfer.serving`: the same as `dashinfer_serve`."""

import sys

from dashinfer.serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
