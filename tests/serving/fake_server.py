"""The command with a fake backend, for tests that need a process: `python fake_server.py FOLDER [flags]`."""

import sys
from pathlib import Path

from fake_engine import FakeBackend

from dashinfer.serving import cli, run

if __name__ == "__main__":
    real_run = run.run
    run.run = lambda config: real_run(config, FakeBackend(Path(sys.argv[1])))
    sys.exit(cli.main(sys.argv[2:]))
