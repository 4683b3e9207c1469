"""The command on a machine other than 0: finds the model there, and runs an agent that starts workers for machine 0."""

import logging
import signal
from functools import partial

import trio

from dashinfer.cluster.agent import Agent
from dashinfer.cluster.link import make_key
from dashinfer.config import ServerConfig
from dashinfer.serving import log
from dashinfer.serving.backend import Backend, ModelBackend
from dashinfer.serving.ending import run_to_end
from dashinfer.serving.progress import make_display
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import Rank

logger = logging.getLogger(__name__)


def run(config: ServerConfig, backend: Backend | None = None) -> int:
    """Be a machine of a cluster until a signal or a failure.

    Returns:
        The exit status: 0 after a signal, 128 + signal where machine 0 had not taken this machine before it, 1 after a failure.

    Raises:
        StartupError: the model is not there, or machine 0 refuses this machine.
    """
    log.configure(config.log_level, config.log_format)
    node = Node(config, backend or ModelBackend())
    return run_to_end(node.live, config.log_level) or node.exit_code


class Node:
    """The parts of the process.

    Attributes:
        exit_code: once `live` has ended without an error.
    """

    exit_code = 0

    def __init__(self, config: ServerConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._agent: Agent | None = None

    async def live(self) -> None:
        """Everything, until it ends. Raises StartupError, alone or in groups."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals, nursery.cancel_scope)
            await self._serve()

    async def _serve(self) -> None:
        config = self._config
        with make_display() as display:
            source = await trio.to_thread.run_sync(self._backend.resolve, config, display.report, abandon_on_cancel=True)
        template = Template()
        self._agent = Agent(
            master_addr=config.master_addr,
            master_port=config.master_port,
            key=make_key(config.cluster_secret),
            node_rank=config.node_rank,
            nnodes=config.nnodes,
            ranks=config.num_ranks // config.nnodes,
            model=config.model_name,
            files=source.files,
            interface=config.cluster_interface,
            heartbeat_timeout=config.heartbeat_timeout,
            make_rank=partial(Rank, template=template, heartbeat_timeout=config.heartbeat_timeout),
        )
        with template:
            await self._agent.run()

    async def _watch_signals(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                logger.info("shutting down")
                self.exit_code = 0 if self._agent is not None and self._agent.joined else 128 + number
                scope.cancel()
