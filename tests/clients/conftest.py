"""A server on the demo model, and programs that use it through other people's clients.

Programs run as processes of their own: clients warn, keep connections, and take seconds and memory to import. A proxy that is
none keeps them from the internet, and the server wants a key.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dashinfer.sources.resolve import resolve
from tests.e2e.conftest import ServerProcess

HERE = Path(__file__).parent
KEY = "sk-clients"
PATIENCE = 900.0  # seconds
NOWHERE = "http://127.0.0.1:9"
ENVIRONMENT = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
    "PYTHONWARNINGS": "default",  # theirs are not ours
}


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a program prints; it begins in `folder`, which is its home too."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "HOME": str(folder), "HF_HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    said = f"{done.stdout[-20_000:]}\n{done.stderr[-20_000:]}"
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{said}"
    return done.stdout


class Report:
    """What a program of `uses` tells, by the name of the use."""

    def __init__(self, output: str) -> None:
        self._results: dict[str, dict[str, Any]] = json.loads(output.splitlines()[-1])

    def __getitem__(self, name: str) -> Any:
        result = self._results[name]
        assert "got" in result, result["failed"]
        return result["got"]


def needs(*packages: str) -> None:
    """Skip where a client is not installed."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the extra `clients` has it")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model with a chat template that shows tools, since its own does not."""
    (weights,) = resolve("demo").files.weights
    model = tmp_path_factory.mktemp("model") / "demo.gguf"
    copy = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", weights, str(model)]
    subprocess.run([*copy, "--chat-template-file", str(HERE / "chat_template.jinja")], check=True, capture_output=True)
    server = ServerProcess.start(
        *("--model", str(model), "--api-keys", KEY, "--kv-cache-memory", "512MiB", "--max-length", "4096"),
        *("--data-type", "float32"),  # log-probabilities can be compared then
    )
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def program(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """Runs one of `programs/` against the server, with more environment if need be."""

    def use(name: str, *which: str, **environment: str) -> Report:
        command = [sys.executable, str(HERE / "programs" / name), server.url, KEY, *which]
        return Report(run(command, tmp_path_factory.mktemp("home"), **environment))

    return use
