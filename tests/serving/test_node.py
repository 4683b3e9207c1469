"""The command on machines other than 0, and on machine 0 when it cannot start, as processes."""

import signal
import sys

import pytest

from .process import free_port, running

COMMAND = [sys.executable, "-m", "dashinfer.serving", "--model", "demo-vlm", "--mode", "llm", "--data-parallel", "2"]
SECRET = {"DASHINFER_CLUSTER_SECRET": "of this test"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_machine_0_is_away(number: signal.Signals) -> None:
    port = free_port()
    with running([*COMMAND, "--nnodes", "2", "--node-rank", "1", "--master-port", str(port)], **SECRET) as node:
        node.wait_for(f"waiting for machine 0 at 127.0.0.1:{port}: ")
        node.signal(number)
        status = node.end()

    assert status == 128 + number
    assert node.said[-1].endswith("shutting down")


def test_machine_0_must_have_the_address() -> None:
    flags = ["--nnodes", "2", "--master-addr", "203.0.113.1", "--port", "0", "--host", "127.0.0.1"]
    with running([*COMMAND, *flags], **SECRET) as server:
        status = server.end()

    assert status == 2
    assert server.said == [
        "dashinfer_serve: error: --master-addr 203.0.113.1 is not an address of this machine; "
        "give the one by which the others reach it"
    ]


def test_machines_without_a_secret() -> None:
    flags = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "203.0.113.1"]
    with running([*COMMAND, *flags], DASHINFER_CLUSTER_SECRET="") as node:
        status = node.end()

    assert status == 2
    assert len(node.said) == 1
    assert "set DASHINFER_CLUSTER_SECRET to the same on each" in node.said[0]
