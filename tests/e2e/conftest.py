"""The demo model, once a session: its files, and a server process on it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from dashinfer.sources import ModelSource
from dashinfer.sources.resolve import resolve
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.tokenizer import Tokenizer
from tests.process_tree import templates_of, workers_of

START_TIMEOUT = 60.0  # seconds


@pytest.fixture(scope="session")
def demo() -> ModelSource:
    """The demo model's files, downloaded on the first run on a machine."""
    return resolve("demo")


@dataclass(frozen=True)
class Text:
    tokenizer: Tokenizer
    template: ChatTemplate

    def prompt(self, *contents: str) -> list[int]:
        """Token ids of a conversation, user first."""
        messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
        return self.tokenizer.encode(self.template.render(messages))


@pytest.fixture(scope="session")
def text(demo: ModelSource) -> Text:
    tokenizer = Tokenizer.from_source(demo)
    return Text(tokenizer, ChatTemplate.from_files(demo.tokenizer, tokenizer.special_tokens))


@dataclass
class ServerProcess:
    """`python -m dashinfer.serving` with its output collected."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)
    url: str = ""
    _ready: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, *arguments: str) -> "ServerProcess":
        command = [sys.executable, "-m", "dashinfer.serving", "--port", "0", "--host", "127.0.0.1", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        server = cls(process)
        threading.Thread(target=server._read, daemon=True).start()
        if not server._ready.wait(START_TIMEOUT) or not server.url:
            server.stop()
            raise AssertionError("the server did not start:\n" + "".join(server.lines))
        return server

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"docs\s+(http://\S+)/docs", line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()

    @property
    def worker_pids(self) -> list[int]:
        return workers_of(self.process.pid)

    @property
    def template_pids(self) -> list[int]:
        return templates_of(self.process.pid)

    def stop(self, timeout: float = 20.0) -> int:
        """End it as a service manager would; returns the exit status."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError("the server did not stop:\n" + "".join(self.lines)) from None
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="session")
def server(demo: ModelSource) -> Iterator[ServerProcess]:
    """A server on the demo model, under the name that the documentation's examples use."""
    server = ServerProcess.start("--model", "demo", "--served-model-name", "Qwen2.5-7B-Instruct", "--kv-cache-memory", "512MiB")
    yield server
    assert server.stop() == 0
