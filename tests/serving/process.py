"""A server process and what it says."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds


class Process:
    """A child whose standard error is read line by line as it comes."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def _read(self) -> None:
        assert self._child.stderr is not None
        for line in self._child.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line from here on that has the pattern."""
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.said.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"ended without {pattern!r}: {self.said}")

    def wait_ready(self) -> None:
        self.url = self.wait_for(r"address +(http://\S+)")[1]
        self.wait_for("docs")

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def end(self) -> int:
        """Wait until it has ended. Returns its exit status."""
        status = self._child.wait(PATIENCE)
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            self.said.append(line)
        return status

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()
        assert self._child.stderr is not None
        self._reader.join(PATIENCE)
        self._child.stderr.close()

    @contextmanager
    def stream(self, content: str, **fields: object) -> Iterator[Iterator[str]]:
        """The pieces of a streamed answer, the first of which has come."""
        body = {"model": "demo", "messages": [{"role": "user", "content": content}], "stream": True, **fields}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE) as answer:
            assert answer.status_code == 200, answer.read()
            pieces = answer.iter_text()
            seen = ""
            while '"content":"' not in seen.replace('"content":""', ""):
                seen += next(pieces)
            yield pieces


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[Process]:
    process = Process(command, environment)
    try:
        yield process
    finally:
        process.kill()


def server_command(folder: Path, *flags: str, model: str = "demo") -> list[str]:
    return [
        sys.executable,
        str(HERE / "fake_server.py"),
        str(folder),
        "--model",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        *flags,
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]
