"""Machine 0's side: agents of the other machines dial here and wait, and groups of ranks are made of them and of local ranks.

A connection is a *place* for one rank. It is free until a group takes it, and used once: when the rank ends, both sides close
it, and the agent dials again. A group that needs a machine which is away waits for it. Lives as long as the server.
"""

import logging
import math
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import trio

from dashinfer import errors
from dashinfer.cluster import network
from dashinfer.cluster.link import HANDSHAKE_TIMEOUT, MAX_BODY, Link, answer_call, make_key
from dashinfer.cluster.messages import Ended, Join, Line, Refusal, Welcome, fingerprint
from dashinfer.config import ServerConfig
from dashinfer.errors import LinkLost
from dashinfer.types import FromParent, ModelFiles, Ready, Start, WorkerConfig
from dashinfer.worker.frames import encode, parent_reader
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import AnyRank, OnMessage, Rank, WorkerGroup

logger = logging.getLogger("dashinfer.cluster")
worker_logger = logging.getLogger("dashinfer.worker")

MakeRank = Callable[..., AnyRank]  # (config, *, template)

MAX_STRANGERS = 64  # connections that have not proved anything yet
RELEASE_TIMEOUT = 3.0  # seconds that an agent has to end a rank
WARNING_INTERVAL = 1.0  # seconds between two lines about strangers
_INBOX = 64  # messages of a rank that wait to be looked at


class Place:
    """A connection at whose other end one rank can run."""

    def __init__(self, node: int, address: str, join: Join, link: Link) -> None:
        self.node = node
        self.address = address
        self.agent = join.agent
        self.port = join.port
        self.link = link
        self.free = True
        self.over = False  # its rank has ended or is to end, so that the connection's end is no news
        self.closed = trio.Event()
        self.reason = ""  # why it was closed
        self.scope = trio.CancelScope()
        self.to_rank, self.inbox = trio.open_memory_channel[Any](_INBOX)

    async def release(self) -> None:
        """Have the rank ended, and wait for that."""
        self.end()
        with trio.move_on_after(RELEASE_TIMEOUT, shield=True):
            await self.closed.wait()
        self.scope.cancel()

    def end(self) -> None:
        """Have the rank ended."""
        self.over = True
        self.link.end()


class Hub:
    """`run` is its life; `workers` makes groups."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        key: bytes,
        master_addr: str,
        nnodes: int,
        ranks: int,
        model: str,
        fingerprint: str,
        interface: str | None = None,
        heartbeat_timeout: float = 10.0,
        make_rank: MakeRank = Rank,
    ) -> None:
        """
        Args:
            listener: from `network.bind`.
            key: from `link.make_key`.
            master_addr: this machine, as the others know it.
            ranks: on each machine.
            fingerprint: of the model, see `messages.fingerprint`.
            interface: for traffic between ranks; None: the one that is listened on.
            heartbeat_timeout: seconds of silence after which a machine counts as lost.
        """
        self._listener = listener
        self._address = listener.getsockname()[0]
        self._key = key
        self._master_addr = master_addr
        self._nnodes, self._ranks = nnodes, ranks
        self._model, self._fingerprint = model, fingerprint
        self._interface = interface or network.interface_of(self._address)
        self._patience = heartbeat_timeout
        self.make_rank = make_rank
        self._places: dict[int, list[Place]] = {node: [] for node in range(1, nnodes)}  # of each machine, oldest first
        self._here: set[int] = set()  # machines that were told of
        self._changed = trio.Event()  # a place has become free
        self._strangers: dict[trio.CancelScope, str] = {}  # their addresses, oldest first
        self._next_warning = -math.inf

    @classmethod
    def from_config(cls, config: ServerConfig, listener: socket.socket, files: ModelFiles) -> "Hub":
        return cls(
            listener,
            key=make_key(config.cluster_secret),
            master_addr=config.master_addr,
            nnodes=config.nnodes,
            ranks=config.num_ranks // config.nnodes,
            model=config.model_name,
            fingerprint=fingerprint(files),
            interface=config.cluster_interface,
            heartbeat_timeout=config.heartbeat_timeout,
            make_rank=partial(Rank, heartbeat_timeout=config.heartbeat_timeout),
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled."""
        self._listener.listen(network.BACKLOG)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        logger.info("taking machines on %s:%d (%s)", *self._listener.getsockname()[:2], self._interface)
        await trio.serve_listeners(self._attend, [listener], task_status=task_status)

    def workers(self, configs: Sequence[WorkerConfig], *, replica: int = 0, template: Template | None = None) -> "ClusterGroup":
        """One life of a group; `replica` is which of the copies of the model it is. `template` starts ranks on this machine."""
        nodes = [(replica * config.world_size + config.rank) // config.local_size for config in configs]
        return ClusterGroup(self, configs, nodes, template)

    # -- agents

    async def _attend(self, stream: trio.SocketStream) -> None:
        """One connection's life."""
        try:
            address = stream.socket.getpeername()[0]
        except OSError:  # it is gone already
            await trio.aclose_forcefully(stream)
            return
        place = None
        with self._stranger(address):
            place = await self._welcome(stream, address)
        if place is None:
            await trio.aclose_forcefully(stream)
        else:
            await self._keep(place)

    @contextmanager
    def _stranger(self, address: str) -> Iterator[None]:
        """Around what an address has to prove. Where there are too many, the oldest one of the address that has the most is cut
        off: who says nothing keeps out nobody but its like."""
        if len(self._strangers) >= MAX_STRANGERS:
            counts = Counter(self._strangers.values())
            self._drop(next(scope for scope, each in self._strangers.items() if counts[each] == max(counts.values())))
        with trio.CancelScope() as scope:
            self._strangers[scope] = address
            try:
                yield
            finally:
                self._strangers.pop(scope, None)

    def _drop(self, scope: trio.CancelScope) -> None:
        self._warn(self._strangers.pop(scope), "too many connections say nothing")
        scope.cancel()

    def _warn(self, address: str, reason: object) -> None:
        if trio.current_time() >= self._next_warning:
            self._next_warning = trio.current_time() + WARNING_INTERVAL
            logger.warning("%s is refused: %s", address, reason)

    async def _welcome(self, stream: trio.SocketStream, peer: str) -> Place | None:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                node, link = await answer_call(stream, self._key)
                join = await link.receive()
                if not isinstance(join, Join):
                    raise LinkLost("it does not say what it has")
                if (refusal := self._refusal(node, join)) is not None:
                    await link.send(refusal)
                    raise LinkLost(refusal.reason)
                await link.send(Welcome())
        except (LinkLost, OSError, trio.TooSlowError) as error:
            self._warn(peer, "it says too little, too slowly" if isinstance(error, trio.TooSlowError) else error)
            return None
        link.limit = MAX_BODY
        return Place(node, peer, join, link)

    def _refusal(self, node: int, join: Join) -> Refusal | None:
        if (join.nnodes, join.ranks) != (self._nnodes, self._ranks):
            theirs = f"{join.nnodes} machines of {join.ranks} ranks"
            return Refusal(f"machine 0 has settings for {self._nnodes} machines of {self._ranks} ranks, not {theirs}", True)
        if node not in self._places:
            return Refusal(f"--node-rank {node} is none of 1 to {self._nnodes - 1}", True)
        if join.fingerprint != self._fingerprint:
            same = "another config.json of" if join.model == self._model else "not"
            return Refusal(f"machine 0 serves {self._model}, {same} {join.model}", True)
        if any(place.agent != join.agent for place in self._places[node]):
            return Refusal(f"there is a machine with --node-rank {node} already, at {self._places[node][0].address}", False)
        return None

    async def _keep(self, place: Place) -> None:
        """Hold a place until its connection ends."""
        places = self._places[place.node]
        if place.node not in self._here:
            self._here.add(place.node)
            logger.info("machine %d is here: %s", place.node, place.address)
        places.append(place)
        free = [each for each in places if each.free]
        if len(free) > self._ranks:  # left by a connection that was cut
            free[0].scope.cancel()
        self._changed.set()
        self._changed = trio.Event()
        try:
            with place.scope, place.to_rank:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(place.link.ping)
                    while True:
                        message = await place.link.receive(self._patience)
                        if place.free:
                            raise LinkLost("a message of a rank that was not started")
                        place.over = place.over or isinstance(message, Ended)
                        with suppress(trio.BrokenResourceError):  # the group has ended, and the connection is about to
                            await place.to_rank.send(message)
        except* LinkLost as group:
            place.reason = str(group.exceptions[0])
        finally:
            places.remove(place)
            place.closed.set()
            await place.link.aclose()
            if not places and not place.over:
                self._here.discard(place.node)
                logger.info("machine %d is gone%s", place.node, f": {place.reason}" if place.reason else "")

    # -- groups

    @asynccontextmanager
    async def take(self, wanted: Counter[int]) -> AsyncIterator[dict[int, list[Place]]]:
        """So many places on each of these machines, once all are there; given back, and their ranks ended, at the end."""
        told: set[int] = set()
        while True:
            taken = {node: self._freshest(node, count) for node, count in wanted.items()}
            away = {node for node, places in taken.items() if len(places) < wanted[node]}
            if not away:
                break
            if away - told:
                logger.info("waiting for %s", ", ".join(f"machine {node}" for node in sorted(away)))
                told |= away
            await self._changed.wait()
        every = [place for places in taken.values() for place in places]
        for place in every:
            place.free = False
        try:
            yield taken
        finally:
            async with trio.open_nursery() as nursery:
                for place in every:
                    nursery.start_soon(place.release)

    def _freshest(self, node: int, count: int) -> list[Place]:
        """The free places that were heard of last: one whose connection is cut, which is not known yet, comes last."""
        free = [place for place in self._places[node] if place.free]
        return sorted(free, key=lambda place: place.link.heard, reverse=True)[:count]

    def local(self, config: WorkerConfig) -> WorkerConfig:
        return msgspec.structs.replace(config, interface=self._interface)

    def meeting_point(self, leader: Place | None) -> str:
        """Where ranks meet whose first one is at this place, or on this machine.

        Raises:
            LinkLost: this machine has no port to meet at now.
        """
        if leader is None:
            try:
                return network.tcp_url(self._master_addr, network.free_port(self._address))
            except OSError as error:  # the address went with its link, or the process has too many files open
                raise LinkLost(f"no port to meet at on {self._address}: {error}") from None
        return network.tcp_url(leader.address, leader.port)


class RemoteRank:
    """A rank at a place on another machine, with what a local `Rank` has."""

    def __init__(self, config: WorkerConfig, place: Place) -> None:
        self._config = config
        self._place = place
        self._name = f"rank {config.rank} on machine {place.node}"

    async def run(self, on_message: OnMessage, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """As `Rank.run`. What ends the connection ends the rank."""
        place = self._place
        try:
            with place.inbox:
                await self.send_frame(encode(Start(self._config)))
                await self._read(on_message, task_status)
        finally:
            await place.release()

    async def _read(self, on_message: OnMessage, task_status: trio.TaskStatus[Ready]) -> None:
        reader = parent_reader()
        async for message in self._place.inbox:
            match message:
                case bytes():
                    for each in reader.feed(message):
                        if isinstance(each, Ready):
                            task_status.started(each)
                        else:
                            on_message(each)
                case Line(text):
                    worker_logger.info("%s: %s", self._name, text)
                case Ended(kind, text):
                    raise self._error(kind, text)
        raise LinkLost(f"{self._name} is lost: {self._place.reason}")

    async def send_frame(self, frame: bytes) -> None:
        """As `Rank.send_frame`."""
        with suppress(LinkLost):
            await self._place.link.send_frame(frame)

    def kill(self) -> None:
        """As `Rank.kill`: the agent kills it as soon as it sees the end of the connection."""
        self._place.end()

    def _error(self, kind: str, text: str) -> errors.DashInferError:
        known = getattr(errors, kind, None)
        if isinstance(known, type) and issubclass(known, errors.StartupError | errors.WorkerError):
            return known(f"machine {self._place.node}: {text}")
        return errors.WorkerError(f"machine {self._place.node}: {text}")


class ClusterGroup:
    """A `WorkerGroup` whose ranks are on several machines."""

    def __init__(
        self, hub: Hub, configs: Sequence[WorkerConfig], nodes: Sequence[int], template: Template | None = None
    ) -> None:
        """`nodes`: the machine of each rank. `template`: see `Hub.workers`."""
        self._hub = hub
        self._configs = configs
        self._nodes = nodes
        self._template = template
        self._group: WorkerGroup | None = None

    async def run(self, **callbacks: Any) -> None:
        """As `WorkerGroup.run`, once every machine that it needs is there."""
        hub, nodes = self._hub, self._nodes
        async with hub.take(Counter(node for node in nodes if node)) as taken:
            places = [taken[node].pop() if node else None for node in nodes]
            if any(nodes):
                url = hub.meeting_point(places[0]) if len(nodes) > 1 else ""
                configs = [msgspec.structs.replace(hub.local(config), rendezvous=url) for config in self._configs]
            else:
                configs = list(self._configs)
            by_rank = {config.rank: place for config, place in zip(configs, places, strict=True)}

            def make_rank(config: WorkerConfig) -> AnyRank:
                place = by_rank[config.rank]
                return hub.make_rank(config, template=self._template) if place is None else RemoteRank(config, place)

            self._group = WorkerGroup(configs, make_rank=make_rank)
            await self._group.run(**callbacks)

    async def send(self, message: FromParent) -> None:
        """As `WorkerGroup.send`."""
        assert self._group is not None, "not started"
        await self._group.send(message)
