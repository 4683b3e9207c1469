"""What a line of the log has in it."""

import json
import logging
from collections.abc import Iterator

import pytest
import trio

from dashinfer.engine.replicas import Replicas
from dashinfer.serving import log

from .fake_engine import INFO

logger = logging.getLogger("dashinfer.worker")


@pytest.fixture
def ours() -> Iterator[None]:
    """The package's logger as it was, afterwards."""
    package, notices = logging.getLogger("dashinfer"), log.notices.level
    before = package.level, package.handlers, package.propagate
    yield
    package.level, package.handlers, package.propagate = before
    log.notices.setLevel(notices)


class Talking:
    """A replica whose worker says something while it loads."""

    state = "ready"

    async def run(self, *, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say)
            task_status.started(INFO)

    async def _say(self) -> None:
        logger.info("rank %d: %s", 0, "hello")


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("format", ["text", "json"])
async def test_lines_of_workers_name_their_replica(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format, libraries=False)
    await Replicas([Talking(), Talking()], max_queue=1).run()
    logger.info("nobody's")
    lines = capsys.readouterr().err.splitlines()
    said = [json.loads(line) for line in lines] if format == "json" else [line.split("INFO    ")[1] for line in lines]

    if format == "text":
        assert sorted(said[:2]) == ["replica 0: rank 0: hello", "replica 1: rank 0: hello"]
        assert said[2:] == ["nobody's"]
    else:
        assert sorted((line["replica"], line["message"]) for line in said[:2]) == [(0, "rank 0: hello"), (1, "rank 0: hello")]
        assert "replica" not in said[2]
