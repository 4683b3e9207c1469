"""Hypercorn's connections, each of which fails alone.

Hypercorn runs them in one nursery with its listeners: what one of them raises ends the server. And a client can make one raise
by bytes beyond ASCII where a WebSocket is asked for or in a path of HTTP/2, by settings of an upgrade that are no base64, by
more priorities than are kept, or by sending too early, or on when it has been answered. Here an error ends its connection, or
where HTTP/2 can tell, its request; and a connection that is to end does. Knows protocols, and nothing of requests.
"""

import logging
from contextlib import suppress
from typing import Any

import hypercorn.protocol
import hypercorn.trio
import hypercorn.trio.run
import trio
from h2.errors import ErrorCodes
from h2.events import DataReceived, PriorityUpdated, RequestReceived
from h2.events import Event as HTTP2Event
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from priority import PriorityError

from dashinfer.serving.log import leaves

logger = logging.getLogger(__name__)

CLOSING = 5.0  # seconds that the end of a connection may take


async def serve(*arguments: Any, **named: Any) -> None:
    """As `hypercorn.trio.serve`."""
    contain()
    await hypercorn.trio.serve(*arguments, **named)


def contain() -> None:
    """Has Hypercorn make its connections, from the next listener on, of these classes: it has no setting for that."""
    hypercorn.trio.run.TCPServer = _Connection
    hypercorn.protocol.H2Protocol = _HTTP2


class _Connection(TCPServer):
    _left = False  # the client has

    async def _read_data(self) -> None:
        await super()._read_data()
        self._left = True
        await self.idle_task.stop()  # which the connection's end would wait for

    async def protocol_send(self, event: Event) -> None:
        """What an answer's end brings about is not cut short, though it cancels the task that it is done in, which is the
        application's: the connection would stay open, or without a limit of its silence."""
        if isinstance(event, RawData):
            await super().protocol_send(event)
            return
        if self._left and isinstance(event, Updated):
            return
        with trio.move_on_after(CLOSING, shield=True):
            await super().protocol_send(event)

    async def run(self) -> None:
        try:
            await super().run()
        except* Exception as errors:
            # As a rule it is the client's doing, and its bytes may be quoted.
            logger.warning("a connection failed and was closed: %.200r", leaves(errors)[0])
            logger.debug("where it failed", exc_info=errors)


class _HTTP2(H2Protocol):
    async def _handle_events(self, events: list[HTTP2Event]) -> None:
        for event in events:
            match event:
                case DataReceived() if event.stream_id not in self.streams:  # it has been answered
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    await self._flush()
                case PriorityUpdated():
                    with suppress(PriorityError):  # it is advice
                        await super()._handle_events([event])
                case RequestReceived():
                    try:
                        await super()._handle_events([event])
                    except Exception as error:
                        logger.warning("a request in HTTP/2 cannot be read and was refused: %.200r", error)
                        await self._refuse(event.stream_id)
                case _:
                    await super()._handle_events([event])

    async def _refuse(self, stream_id: int) -> None:
        self.streams.pop(stream_id, None)
        self.stream_buffers.pop(stream_id, None)
        with suppress(PriorityError):
            self.priority.remove_stream(stream_id)
        self.connection.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
        await self._flush()
