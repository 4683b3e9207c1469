"""The section `demo`: the real demo model over HTTP, its tokens beside those that a CPU gave, and its speed.

Tokens are compared in float32 on both sides, where nothing but an error makes them differ for long; speed is that of bfloat16.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]
REFERENCE = Path(__file__).with_name("demo_reference.json")
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in three sentences why the sky is blue.",
    "List five animals that live in Africa.",
    "Translate 'good morning, my friend' into French, Spanish and Italian.",
    "What is 17 plus 25? Think step by step.",
    "Tell me about the history of the steam engine.",
    "Give me a recipe for pancakes.",
)
OUTPUT_TOKENS = 48
NEEDED = ("trio", "hypercorn", "quart_trio", "msgspec", "gguf", "tokenizers")
START_SECONDS = 120.0  # kernels may have to be compiled


def find_demo() -> Path | None:
    """The demo model's file, from the cache or the installed package; nothing is fetched."""
    from dashinfer.sources import demo
    from dashinfer.sources.cache import cache_directory

    spec = importlib.util.find_spec(demo.PACKAGE.replace("-", "_"))
    places = [Path(each) for each in (spec.submodule_search_locations or ())] if spec else []
    places.append(cache_directory() / "demo" / demo.SHA256[:16])
    return next((place / demo.FILE for place in places if (place / demo.FILE).is_file()), None)


def run(emit: Callable[[Row], None], *, deadline: float, toy: bool, file: Path | None = None) -> None:
    """Both comparisons, as far as `deadline` of `time.monotonic` allows; `toy` takes the first prompts on CPU alone."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        emit({"section": "demo", "status": f"not measured: not installed: {', '.join(missing)}"})
        return
    if (file := file or find_demo()) is None:
        emit({"section": "demo", "status": "not measured: the demo model's file is not there"})
        return
    try:
        _measure(emit, file, deadline=deadline, toy=toy)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:  # no start, an HTTP error, a bench that failed
        emit({"section": "demo", "status": f"failed: {error}"})


def _measure(emit: Callable[[Row], None], file: Path, *, deadline: float, toy: bool) -> None:
    reference = json.loads(REFERENCE.read_text())["answers"][: 2 if toy else None]
    device = "cpu" if toy else "cuda"
    with serving(file, "--device", device, "--data-type", "float32") as url:
        answers = [ask(url, each["prompt"], len(each["tokens"])) for each in reference]
    emit({"section": "demo", "status": "ok", **compare(reference, answers)})
    if toy or time.monotonic() > deadline - 30:
        return
    with serving(file, "--device", device, "--max-batch", "64") as url:
        emit({"section": "demo", "status": "ok", "levels": measure_speed(url)})


def make_reference(file: Path | None = None) -> None:
    """Writes the tokens that this machine's CPU gives. Raises FileNotFoundError where there is no demo model."""
    if (file := file or find_demo()) is None:
        raise FileNotFoundError("the demo model's file is not there; give --demo FILE")
    with serving(file, "--device", "cpu", "--data-type", "float32") as url:
        answers = [{"prompt": prompt, "tokens": ask(url, prompt, OUTPUT_TOKENS)} for prompt in PROMPTS]
    REFERENCE.write_text(json.dumps({"data_type": "float32", "answers": answers}, indent=1, ensure_ascii=False) + "\n")


def compare(reference: list[Row], answers: list[list[str]]) -> Row:
    """How many answers agree, and where the others part; tokens as text."""
    prefixes = []
    for each, answer in zip(reference, answers, strict=True):
        pairs = zip(each["tokens"], answer, strict=False)
        prefixes.append(next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(each["tokens"]), len(answer))))
    equal = sum(each["tokens"] == answer for each, answer in zip(reference, answers, strict=True))
    return {"answers": len(answers), "equal": equal, "common_tokens": prefixes}


def ask(url: str, prompt: str, max_tokens: int) -> list[str]:
    """The tokens of a greedy answer, as text."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        choice = json.load(answer)["choices"][0]
    return [each["token"] for each in choice["logprobs"]["content"]]


def measure_speed(url: str) -> list[Row]:
    """`dashinfer_bench` at several concurrencies, a round each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        command = [sys.executable, "-m", "dashinfer.bench", "--url", f"{url}/v1", "--concurrency", "1,16,64", "--rounds", "1"]
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    return [{"concurrency": level["concurrency"], **level["median"]} for level in found["targets"][0]["levels"]]


@contextmanager
def serving(file: Path, *flags: str) -> Iterator[str]:
    """A server of the demo model, ready; yields its address. Raises RuntimeError if it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dashinfer.serving", "--model", str(file), "--served-model-name", "demo"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *flags], stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Any) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and server.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the server did not start: {log.read().decode(errors='replace')[-500:]}")
