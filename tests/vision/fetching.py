"""What tests of fetching share."""

from functools import partial

import pytest
import trio

from dashinfer.errors import InvalidRequest, MediaError
from dashinfer.vision.fetch import fetch
from dashinfer.vision.network import Internet
from dashinfer.vision.policy import MediaPolicy
from tests.vision.fake_internet import FakeInternet, Server

PICTURE = bytes(range(256)) * 8
POLICY = MediaPolicy(timeout=5, max_bytes=4096)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)
NOT_PUBLIC = "no address, or one that is not public"


async def refusal(source: str, policy: MediaPolicy, internet: FakeInternet | Internet) -> str:
    """The reason for which a source is refused."""
    with pytest.raises(MediaError) as caught:
        await fetch(source, policy, index=3, network=internet)
    assert isinstance(caught.value, InvalidRequest) and caught.value.status == 400
    assert caught.value.index == 3
    assert caught.value.message == f"media[3]: {caught.value.reason}"
    return caught.value.reason


async def listen(nursery: trio.Nursery, server: Server) -> int:
    """The port of a true server on 127.0.0.1."""
    listeners = await nursery.start(partial(trio.serve_tcp, server, 0, host="127.0.0.1"))
    return listeners[0].socket.getsockname()[1]
