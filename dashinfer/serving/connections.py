"""Hypercorn's connections, each of which fails alone.

Hypercorn runs them in one nursery with its listeners: what one of them raises ends the server. And a client can make one raise
by bytes beyond ASCII where a WebSocket is asked for or in a path of HTTP/2, by settings of an upgrade that are no base64, by
more priorities than are kept, or by sending too early, or on when it has been answered. Here an error ends its connection, or
where HTTP/2 can tell, its request. Knows protocols, and nothing of requests.
"""

import logging
from contextlib import suppress
from typing import Any

import hypercorn.protocol
import hypercorn.trio
import hypercorn.trio.run
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, PriorityUpdated, RequestReceived
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from priority import PriorityError

from dashinfer.serving.log import leaves

logger = logging.getLogger(__name__)


async def serve(*arguments: Any, **named: Any) -> None:
    """As `hypercorn.trio.serve`."""
    contain()
    await hypercorn.trio.serve(*arguments, **named)


def contain() -> None:
    """Has Hypercorn make its connections, from the next listener on, of these classes: it has no setting for that."""
    hypercorn.trio.run.TCPServer = _Connection
    hypercorn.protocol.H2Protocol = _HTTP2


class _Connection(TCPServer):
    async def run(self) -> None:
        try:
            await super().run()
        except* Exception as errors:
            # As a rule it is the client's doing, and its bytes may be quoted.
            logger.warning("a connection failed and was closed: %.200r", leaves(errors)[0])
            logger.debug("where it failed", exc_info=errors)


class _HTTP2(H2Protocol):
    async def _handle_events(self, events: list[Event]) -> None:
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
