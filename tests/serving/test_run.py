"""The command as a process: start, signals, drain, failures, exit statuses."""

import json
import signal
import socket
from pathlib import Path

import httpx
import pytest

from .process import PATIENCE, running, server_command


def test_start_and_clean_end(tmp_path: Path) -> None:
    with running(server_command(tmp_path)) as server:
        server.wait_ready()
        health = httpx.get(f"{server.url}/health")
        server.signal(signal.SIGTERM)
        status = server.end()

    assert health.json() == {"status": "ok", "mode": "llm"}
    assert status == 0
    shown = "\n".join(server.said)
    for part in ("Fetching the model: done, 1000 B", "16,000 tokens", "4,096 tokens", "bfloat16", f"{server.url}/docs"):
        assert part in shown
    assert "Traceback" not in shown


@pytest.mark.feature("Operations", "Requests finish before an end")
def test_running_requests_finish_and_new_ones_find_the_port_closed(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--drain-timeout", "20")) as server:
        server.wait_ready()
        with server.stream("forever", max_tokens=3900, n=4) as pieces:
            server.signal(signal.SIGINT)
            server.wait_for("shutting down: 1 requests")
            server.signal(0)  # still there
            rest = "".join(pieces)
        status = server.end()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")

    assert status == 0
    assert rest.endswith("data: [DONE]\n\n")
    assert rest.count('"finish_reason":"length"') == 4


def test_what_does_not_finish_is_told_and_cut(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--drain-timeout", "0.2")) as server:
        server.wait_ready()
        with server.stream("wait ab") as pieces:
            server.signal(signal.SIGTERM)
            rest = "".join(pieces)
        status = server.end()

    assert status == 0
    event = rest.removeprefix("data: ").strip()
    assert "the server shut down" in json.loads(event)["error"]["message"]
    assert "[DONE]" not in rest
    assert any("did not finish within 0.2 s" in line for line in server.said)


def test_a_signal_after_the_last_request_changes_nothing(tmp_path: Path) -> None:
    with running(server_command(tmp_path)) as server:
        server.wait_ready()
        with server.stream("forever", max_tokens=1000) as pieces:
            server.signal(signal.SIGTERM)
            "".join(pieces)
        for _ in range(5):
            server.signal(signal.SIGTERM)
        status = server.end()

    assert status == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--drain-timeout", "1000")) as server:
        server.wait_ready()
        with server.stream("wait ab"):
            server.signal(signal.SIGINT)
            server.wait_for("shutting down")
            server.signal(signal.SIGINT)
            status = server.end()

    assert status == 128 + signal.SIGINT
    assert "Traceback" not in "\n".join(server.said)


def test_while_loading(tmp_path: Path) -> None:
    with running(server_command(tmp_path, model="never-loads")) as server:
        url = server.wait_for(r"taking (http://\S+);")[1]
        health = httpx.get(f"{url}/health", timeout=PATIENCE)
        chat = httpx.post(f"{url}/v1/chat/completions", json={}, timeout=PATIENCE)
        server.signal(signal.SIGINT)
        status = server.end()

    assert (health.status_code, health.json()) == (503, {"status": "loading", "mode": None})
    assert chat.status_code == 503
    assert status == 130
    assert not any("error" in line.lower() or "Traceback" in line for line in server.said)


def test_a_failing_start_is_one_line(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--log-level", "error", model="no-memory")) as server:
        status = server.end()

    assert status == 1
    assert server.said == ["dashinfer_serve: error: the weights need 15.2 GiB and 4.0 GiB are free; take a smaller model"]


def test_debug_shows_where_a_start_failed(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--log-level", "debug", model="no-memory")) as server:
        status = server.end()

    assert status == 1
    assert any("Traceback" in line for line in server.said)


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running([*server_command(tmp_path), "--port", str(port)]) as server:
            status = server.end()

    assert status == 1
    assert server.said == [
        f"dashinfer_serve: error: port {port} on 127.0.0.1 is in use; choose another with --port, or --port 0 for a free one"
    ]


@pytest.mark.parametrize(("host", "status"), [("no-such-host.invalid", 2), ("192.0.2.1", 1)])
def test_a_host_that_is_not_ours(tmp_path: Path, host: str, status: int) -> None:
    with running([*server_command(tmp_path), "--host", host]) as server:
        assert server.end() == status

    assert len(server.said) == 1
    assert host in server.said[0]


def test_an_engine_that_dies_ends_the_process(tmp_path: Path) -> None:
    with running(server_command(tmp_path)) as server:
        server.wait_ready()
        with server.stream("crash") as pieces:
            rest = "".join(pieces)
        status = server.end()

    assert status == 1
    assert '"code":"internal_error"' in rest
    assert "[DONE]" not in rest
    assert server.said[-1] == "dashinfer_serve: error: rank 0 died with signal 9"
    assert "Traceback" not in "\n".join(server.said)


def test_nothing_can_hang_the_end(tmp_path: Path) -> None:
    """An engine that cannot be cancelled, which would be a bug."""
    with running(server_command(tmp_path, model="never-ends")) as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        status = server.end()

    assert status == 0
    assert any("could not stop within 5 s" in line for line in server.said)
