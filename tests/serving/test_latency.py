"""The event loop while images are prepared: somebody else's request must not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from .conftest import RunServer
from .fake_engine import SeeingEngine
from .seeing import data_uri, encode, make_text, picture, write_model

IMAGES, EACH = 32, 4  # images, and of one request
ATTEMPTS = 3

# Both are processes of their own: what is measured must not be the measuring.
ASK = """
import http.client, sys, threading
host, port, path, times = sys.argv[1:]
body = open(path, "rb").read()
statuses = []
def ask():
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", "/v1/chat/completions", body)
    statuses.append(connection.getresponse().status)
threads = [threading.Thread(target=ask) for _ in range(int(times))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(statuses)
"""
PROBE = """
import json, socket, sys, threading, time
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
took = []
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    while not stop.is_set():
        began = time.perf_counter()
        connection.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(4096)
        took.append(time.perf_counter() - began)
        time.sleep(0.005)
print(json.dumps(took))
"""


async def test_health_answers_while_images_are_prepared(run_server: RunServer, tmp_path: Path) -> None:
    """Thirty-two pictures of four megapixels, as files in the bodies, at their full size."""
    model = make_text(write_model(tmp_path / "model", max_pixels=12845056))
    uris = [data_uri(encode(picture(2000, 2000, seed), "JPEG", quality=80)) for seed in range(2)]
    parts = [{"type": "image_url", "image_url": {"url": uris[number % 2]}} for number in range(EACH)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "say a"}]}]
    (tmp_path / "body").write_text(json.dumps({"model": "demo", "messages": messages}))

    busy = os.getloadavg()[0] > (os.cpu_count() or 1)  # others want the machine, and waiting for a core is no answer's fault
    waits = []  # of each attempt: the answer at 99%, and what the server needed for a picture, in seconds
    async with run_server(engine_type=SeeingEngine, model=model) as server:
        server.engine.resize(2**20)
        place = server.url.removeprefix("http://").split(":")
        asking = [sys.executable, "-c", ASK, *place, str(tmp_path / "body"), str(IMAGES // EACH)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        while len(waits) < ATTEMPTS and not any(map(_is_prompt, waits)):
            with subprocess.Popen([sys.executable, "-c", PROBE, *place], **pipes) as probe:  # noqa: ASYNC220
                began = trio.current_time()
                asked = await trio.run_process(asking, capture_stdout=True)
                elapsed = trio.current_time() - began
                output, _ = await trio.to_thread.run_sync(probe.communicate, "stop\n")
            assert json.loads(asked.stdout) == [200] * (IMAGES // EACH)
            took = sorted(json.loads(output))
            assert len(took) > 100
            waits.append((took[len(took) * 99 // 100], elapsed / IMAGES))

    if busy and not any(map(_is_prompt, waits)):
        pytest.skip("the machine has other work")
    assert any(map(_is_prompt, waits)), f"99% were answered within, and a picture took: {waits} seconds"


def _is_prompt(wait: tuple[float, float]) -> bool:
    """Within 50 ms, or on a slow machine sooner than a picture: nobody waited for one."""
    answer, picture = wait
    return answer < max(0.05, picture)
