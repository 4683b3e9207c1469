"""The event loop while images are prepared: somebody else's request must not notice."""

import json
import subprocess
import sys
from pathlib import Path

import httpx
import trio

from .conftest import RunServer
from .fake_engine import SeeingEngine
from .seeing import data_uri, encode, make_text, picture, write_model

IMAGES, EACH = 32, 4  # images, and of one request

# A process of its own: what it measures must not be its own work. Asks until a line comes, and prints seconds.
PROBE = """
import json, socket, sys, threading, time
host, port = sys.argv[1], int(sys.argv[2])
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
took = []
with socket.create_connection((host, port)) as connection:
    while not stop.is_set():
        began = time.perf_counter()
        connection.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(4096)
        took.append(time.perf_counter() - began)
        time.sleep(0.01)
print(json.dumps(took))
"""


async def test_health_answers_while_images_are_prepared(run_server: RunServer, tmp_path: Path) -> None:
    """Thirty-two pictures of four megapixels, as files in the bodies, at their full size."""
    model = make_text(write_model(tmp_path, max_pixels=12845056))
    uris = [data_uri(encode(picture(2000, 2000, seed), "JPEG", quality=80)) for seed in range(2)]
    parts = [{"type": "image_url", "image_url": {"url": uris[number % 2]}} for number in range(EACH)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "say a"}]}]
    body = json.dumps({"model": "demo", "messages": messages}).encode()
    statuses = []

    async with run_server(engine_type=SeeingEngine, model=model) as server:
        server.engine.resize(2**20)
        host, port = server.url.removeprefix("http://").split(":")
        with subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", PROBE, host, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as probe:

            async def ask() -> None:
                async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                    statuses.append((await client.post("/v1/chat/completions", content=body)).status_code)

            async with trio.open_nursery() as nursery:
                for _ in range(IMAGES // EACH):
                    nursery.start_soon(ask)
            output, _ = await trio.to_thread.run_sync(probe.communicate, "stop\n")

    took = sorted(json.loads(output))
    assert statuses == [200] * (IMAGES // EACH)
    assert len(took) > 100
    assert took[len(took) * 99 // 100] < 0.05, f"the slowest: {took[-5:]}, the median: {took[len(took) // 2]}"
