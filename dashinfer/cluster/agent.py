"""The other machines' side: dials machine 0, waits there for ranks to start, and is their parent while it holds the connection.

There is one connection for each rank that this machine has room for. When one ends, by whatever cause, its rank is killed, and
the agent dials again: for ever, since machine 0 may be away for a while and then start its ranks anew.
"""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from dashinfer.cluster import network
from dashinfer.cluster.link import HANDSHAKE_TIMEOUT, MAX_BODY, Link, call
from dashinfer.cluster.messages import Ended, Join, Line, Refusal, Welcome, fingerprint
from dashinfer.errors import ConfigurationError, DashInferError, LinkLost
from dashinfer.types import FromWorker, ModelFiles, Ready, Start, WorkerConfig
from dashinfer.worker.frames import encode, worker_reader
from dashinfer.worker.supervisor import Rank, one_error

logger = logging.getLogger("dashinfer.cluster")

FIRST_WAIT, LONGEST_WAIT = 0.1, 2.0  # seconds until machine 0 is dialled again; doubled each time
MOST_WAITING = 1000  # messages for machine 0 beyond which lines of a rank's output are left out
FAREWELL = 3.0  # seconds for machine 0 to read why a rank ended

MakeRank = Callable[..., Rank]  # (config, *, on_line)


class Agent:
    """`run` is its life.

    Attributes:
        joined: machine 0 has taken this machine at least once.
    """

    joined = False

    def __init__(
        self,
        *,
        master_addr: str,
        master_port: int,
        key: bytes,
        node_rank: int,
        nnodes: int,
        ranks: int,
        model: str,
        files: ModelFiles,
        interface: str | None = None,
        heartbeat_timeout: float = 10.0,
        make_rank: MakeRank = Rank,
    ) -> None:
        """
        Args:
            key: from `link.make_key`.
            ranks: on each machine.
            model: its name, for people.
            files: of the model, on this machine.
            interface: for all traffic; None: the one that machine 0 is reached by.
            heartbeat_timeout: seconds of silence after which machine 0 counts as lost.
        """
        self._master = (master_addr, master_port)
        self._key = key
        self._node_rank = node_rank
        self._ranks = ranks
        self._files = files
        self._interface = interface
        self._patience = heartbeat_timeout
        self._make_rank = make_rank
        self._join = Join(os.urandom(16), nnodes, ranks, model, fingerprint(files), 0)
        self._trouble = ""  # the last that was told

    async def run(self) -> None:
        """Serve machine 0 until cancelled.

        Raises:
            ConfigurationError: machine 0 refuses this machine, and never took it before.
        """
        with one_error():
            async with trio.open_nursery() as nursery:
                for _ in range(self._ranks):
                    nursery.start_soon(self._keep_place)

    async def _keep_place(self) -> None:
        wait = FIRST_WAIT
        while True:
            try:
                stream = await self._dial()
                try:
                    await self._attend(stream)
                finally:
                    await trio.aclose_forcefully(stream)
                wait = FIRST_WAIT
            except (OSError, LinkLost, ConfigurationError) as error:
                if isinstance(error, ConfigurationError) and not self.joined:
                    raise
                self._tell(str(error))
            await trio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _tell(self, trouble: str) -> None:
        """Once for all connections, until one is taken."""
        if trouble != self._trouble:
            self._trouble = trouble
            logger.info("waiting for machine 0 at %s:%d: %s", *self._master, trouble)

    async def _dial(self) -> trio.SocketStream:
        host, port = self._master
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            local = None
            if self._interface is not None:
                local = await trio.to_thread.run_sync(network.address_of, self._interface, host, abandon_on_cancel=True)
            stream = await trio.open_tcp_stream(host, port, local_address=local)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return stream
        raise LinkLost("no answer")

    async def _attend(self, stream: trio.SocketStream) -> None:
        """One connection's life, and that of the rank that is started over it. Raises LinkLost, ConfigurationError."""
        address = stream.socket.getsockname()[0]
        interface = self._interface or network.interface_of(address)
        meeting, port = network.hold_port(address)
        with meeting:
            link = None
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                link = await call(stream, self._key, self._node_rank)
                await link.send(msgspec.structs.replace(self._join, port=port))
                match await link.receive():
                    case Welcome():
                        pass
                    case Refusal(reason, final):
                        raise (ConfigurationError if final else LinkLost)(reason)
                    case _:
                        raise LinkLost("it answers something else")
            if link is None:
                raise LinkLost("what is there does not answer")
            link.limit = MAX_BODY
            if not self.joined or self._trouble:
                logger.info("machine 0 at %s:%d has taken this machine as number %d", *self._master, self._node_rank)
            self.joined, self._trouble = True, ""
            await self._serve(link, interface, meeting)

    async def _serve(self, link: Link, interface: str, meeting: socket.socket) -> None:
        """Raises LinkLost, unless it was the rank that ended."""
        # What machine 0 sends is bounded by its plans in flight. Without bounds here, the end of the connection is seen behind
        # whatever a rank does not read.
        to_rank, from_hub = trio.open_memory_channel[bytes](float("inf"))
        to_hub, from_rank = trio.open_memory_channel[Any](float("inf"))

        def tell(message: Any) -> None:
            if not isinstance(message, Line) or to_hub.statistics().current_buffer_used < MOST_WAITING:
                to_hub.send_nowait(message)

        ended = None
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(link.ping)
                    nursery.start_soon(self._receive, link, to_rank)
                    start = decode_start(await from_hub.receive())
                    meeting.close()
                    nursery.start_soon(self._send, link, from_rank)
                    config = msgspec.structs.replace(start.config, files=self._files, interface=interface)
                    ended = await self._run_rank(config, from_hub, tell)
                    tell(ended)
                    await trio.sleep(FAREWELL)  # less, as machine 0 closes the connection once it has read that
                    nursery.cancel_scope.cancel()
        except LinkLost:
            if ended is None:
                raise

    async def _receive(self, link: Link, to_rank: trio.MemorySendChannel[bytes]) -> None:
        while True:
            frame = await link.receive(self._patience)
            if not isinstance(frame, bytes):
                raise LinkLost("machine 0 sent what is not for a rank")
            to_rank.send_nowait(frame)

    async def _send(self, link: Link, from_rank: trio.MemoryReceiveChannel[Any]) -> None:
        async for message in from_rank:
            if isinstance(message, bytes):
                await link.send_frame(message)
            else:
                await link.send(message)
            if isinstance(message, Ended):
                link.end()

    async def _run_rank(
        self, config: WorkerConfig, from_hub: trio.MemoryReceiveChannel[bytes], tell: Callable[[Any], None]
    ) -> Ended:
        """The rank's life; what it says is told as it comes."""

        def on_message(message: FromWorker) -> None:
            tell(encode(message))

        rank = self._make_rank(config, on_line=lambda text: tell(Line(text)))
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    try:
                        ready: Ready = await nursery.start(rank.run, on_message)
                        on_message(ready)
                        async for frame in from_hub:
                            await rank.send_frame(frame)
                    except trio.Cancelled:
                        rank.kill()  # with the connection goes all that it could be asked politely for
                        raise
        except DashInferError as error:
            logger.warning("%s", error)
            return Ended(type(error).__name__, str(error))
        raise AssertionError("a rank ends with an error")


def decode_start(frame: bytes) -> Start:
    """Raises LinkLost."""
    try:
        messages = list(worker_reader().feed(frame))
    except DashInferError as error:
        raise LinkLost(str(error)) from None
    if len(messages) != 1 or not isinstance(messages[0], Start):
        raise LinkLost("machine 0 sent something else than the start of a rank")
    return messages[0]
