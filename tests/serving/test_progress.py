"""Progress as it is seen: bars on a terminal, lines elsewhere, nothing where it is not wanted."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.feature("Clients", "Python without a server")

SCRIPT = """
import sys
from pathlib import Path
from dashinfer import LLM
from tests.serving.fake_engine import FakeBackend

conversations = [[{"role": "user", "content": f"say {number}"}] for number in range(3)]
with LLM("fake", backend=FakeBackend(Path(sys.argv[1]))) as llm:
    print("LOADED", file=sys.stderr)
    llm.chat(conversations)
    print("ANSWERED", file=sys.stderr)
    llm.chat(conversations, progress=False)
    llm.generate(["say a", "say b"], progress=False)
    print("END", file=sys.stderr)
"""


def said(folder: Path, terminal: bool) -> tuple[str, str, str]:
    """What the script writes to standard error while it loads, while it answers, and when it is to be silent."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with subprocess.Popen(command, stderr=writing, env=environment) as process:
        os.close(writing)
        pieces = []
        try:
            while piece := os.read(reading, 65536):
                pieces.append(piece)
        except OSError:  # how a terminal ends
            pass
        os.close(reading)
        assert process.wait(30) == 0, b"".join(pieces).decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(pieces).decode())
    loading, _, rest = text.partition("LOADED")
    answering, _, rest = rest.partition("ANSWERED")
    return loading, answering, rest.partition("END")[0].strip()


def test_bars_on_a_terminal(tmp_path: Path) -> None:
    loading, answering, silent = said(tmp_path, terminal=True)

    assert re.search(r"Fetching the model +━+ 1000 B / 1000 B", loading)
    assert re.search(r"Loading weights +━+ 100 B / 100 B", loading)
    assert re.search(r"Answering +━+ 3 / 3", answering)
    assert silent == ""


def test_lines_elsewhere(tmp_path: Path) -> None:
    loading, answering, silent = said(tmp_path, terminal=False)

    assert "Fetching the model: done, 1000 B" in loading
    assert "Answering: done, 3" in answering
    assert "━" not in loading + answering
    assert silent == ""
