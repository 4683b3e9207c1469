"""One connection between two machines: who is at the other end is proved first, and every frame after that carries a MAC.

Both sides prove that they know the secret, over nonces of both, so that nothing that was recorded or that the other side said
itself can serve as a proof; the dialling side proves first, so that a stranger who dials learns nothing to guess the secret
from. Keys for frames, one for each direction, come from the same nonces. A MAC covers a frame's place in the stream, so none
can be changed, left out, repeated or put elsewhere unnoticed. Nothing is encrypted.

    hub    version, nonce
    agent  version, node rank, nonce, HMAC-SHA256(secret, "agent" + all of the above)
    hub    verdict, HMAC-SHA256(secret, "hub" + all of the above)
    both   length of the body, body, HMAC-SHA256(key of the direction, place + length + body) ...

A version is a magic number, the protocol's number and the fingerprint of all message types. Who finds another one says its own
and hangs up. A body is a message of `dashinfer.cluster.messages`, or a frame from or for a rank, of `dashinfer.worker.frames`.
"""

import hashlib
import hmac
import os
import struct
from contextlib import suppress
from typing import Literal

import msgspec
import trio

from dashinfer.cluster.messages import PROTOCOL, FromAgent, FromHub, Ping
from dashinfer.cluster.wire import WIRE
from dashinfer.errors import ConfigurationError, LinkLost
from dashinfer.types import MAX_FRAME_BYTES

Side = Literal["agent", "hub"]

PING_INTERVAL = 1.0  # seconds
HANDSHAKE_TIMEOUT = 5.0  # seconds from the connection to the answer to `Join`
LATE = 1.0  # seconds past a deadline: noticed later than that, it passed while this process itself was stopped
MAX_BODY = MAX_FRAME_BYTES + 64
MAX_MESSAGE = 64 * 1024  # bytes of a message of ours
_SLOW = 1 << 20  # bytes whose MAC takes long enough to be left to a thread
_ROUNDS = 100_000  # of PBKDF2, about 50 ms: guesses at a weak secret cost as much each

_MAGIC = b"dashinfr"
_VERSION = struct.Struct("<8sH8s")  # magic, protocol, message types
_NONCE = 32
_NODE = struct.Struct("<I")
_DIGEST = 32
_LENGTH = struct.Struct("<I")
_PLACE = struct.Struct("<Q")
_ACCEPTED, _WRONG_SECRET = b"\x01", b"\x02"
_MESSAGE, _FRAME = b"\x00", b"\x01"  # first byte of a body

_encoder = msgspec.msgpack.Encoder()
_PING = _MESSAGE + _encoder.encode(Ping())
_decoders = {"agent": msgspec.msgpack.Decoder(FromHub), "hub": msgspec.msgpack.Decoder(FromAgent)}


def make_key(secret: str | None) -> bytes:
    """What proofs are made with. Without a secret, which is for one machine alone, everyone can make it. Takes 50 ms."""
    return hashlib.pbkdf2_hmac("sha256", (secret or "").encode(), b"dashinfer cluster", _ROUNDS)


class Link:
    """An authenticated connection. One task receives; any may send."""

    def __init__(self, stream: trio.SocketStream, side: Side, send_key: bytes, receive_key: bytes) -> None:
        self._stream = stream
        self._decoder = _decoders[side]
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self._lock = trio.Lock()
        self._torn = False  # a frame was sent in part
        self._ended = False
        self.heard = trio.current_time()  # when the other side last sent something
        self._buffer = bytearray()
        self.limit = MAX_MESSAGE  # of what the other side sends; raised once it is welcome

    async def send(self, message: FromHub | FromAgent) -> None:
        """Raises LinkLost."""
        await self._send(_MESSAGE + _encoder.encode(message))

    async def send_frame(self, frame: bytes) -> None:
        """A frame from or for a rank. Raises LinkLost."""
        await self._send(_FRAME + frame)

    async def ping(self) -> None:
        """Tell the other side once a second that this one is there, until `end`. Raises LinkLost."""
        try:
            while True:
                await self._send(_PING)
                await trio.sleep(PING_INTERVAL)
        except LinkLost:
            if not self._ended:
                raise

    async def receive(self, patience: float = float("inf")) -> FromHub | FromAgent | bytes:
        """The next message or, as bytes, frame; no pings, which only show that the other side is there.

        Raises:
            LinkLost: the connection ended, nothing came for `patience` seconds, or it was not the other side that sent it. Time
                in which this process was stopped does not count.
        """
        while True:
            body = await self._receive_body(patience)
            if body[:1] == _FRAME:
                return body[1:]
            try:
                message = self._decoder.decode(body[1:])
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise LinkLost(f"a message does not decode: {error}") from None
            if not isinstance(message, Ping):
                return message

    def end(self) -> None:
        """Nothing more is sent, not even the rest of what is being sent."""
        self._ended = True
        with suppress(OSError, trio.ClosedResourceError):
            self._stream.socket.shutdown(trio.socket.SHUT_WR)

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _send(self, body: bytes) -> None:
        async with self._lock:
            if self._torn or self._ended:
                raise LinkLost("the connection is closed")
            length = _LENGTH.pack(len(body))
            mac = await _mac(self._send_key, self._sent, length, body)
            self._sent += 1
            self._torn = True
            try:
                await self._stream.send_all(length + body + mac)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise LinkLost("the connection is closed") from None
            self._torn = False

    async def _receive_body(self, patience: float) -> bytes:
        await self._fill(_LENGTH.size, patience)
        (length,) = _LENGTH.unpack_from(self._buffer)
        if not 1 <= length <= self.limit:
            raise LinkLost(f"a frame of {length} bytes is over the limit of {self.limit}")
        end = _LENGTH.size + length
        await self._fill(end + _DIGEST, patience)
        body = bytes(self._buffer[_LENGTH.size : end])
        mac = await _mac(self._receive_key, self._received, self._buffer[: _LENGTH.size], body)
        if not hmac.compare_digest(mac, self._buffer[end : end + _DIGEST]):
            raise LinkLost("a frame is not authentic")
        self._received += 1
        del self._buffer[: end + _DIGEST]
        return body

    async def _fill(self, size: int, patience: float) -> None:
        while len(self._buffer) < size:
            with trio.move_on_after(patience) as silence:
                data = await _receive_some(self._stream)
            if silence.cancelled_caught:
                if trio.current_time() > silence.deadline + LATE:
                    continue
                raise LinkLost(f"no sign of life for {patience:g} s")
            if not data:
                raise LinkLost("the connection is closed")
            self.heard = trio.current_time()
            self._buffer += data


async def call(stream: trio.SocketStream, key: bytes, node_rank: int) -> Link:
    """The agent's side of the handshake.

    Raises:
        ConfigurationError: the secrets differ, or the versions.
        LinkLost: this is no hub, or it went away.
    """
    theirs = await _receive_exactly(stream, _VERSION.size)
    if not theirs.startswith(_MAGIC):
        raise LinkLost("what answers there is not dashinfer_serve")
    if (difference := _difference(theirs)) is not None:
        await _send_all(stream, _version())
        # a connection with something unread is cut rather than closed, and what was sent may be lost
        await _receive_some(stream)
        raise ConfigurationError(f"machine 0 runs another version of dashinfer ({difference})")
    greeting = theirs + await _receive_exactly(stream, _NONCE)
    answer = _version() + _NODE.pack(node_rank) + os.urandom(_NONCE)
    proof = _digest(key, b"agent", greeting, answer)
    await _send_all(stream, answer + proof)
    verdict = await _receive_exactly(stream, 1 + _DIGEST)
    if verdict[:1] == _WRONG_SECRET:
        raise ConfigurationError("machine 0 has another --cluster-secret")
    if not hmac.compare_digest(verdict[1:], _digest(key, b"hub", greeting, answer, proof)):
        raise ConfigurationError("machine 0 cannot prove that it knows the --cluster-secret")
    to_hub, to_agent = _session_keys(key, greeting, answer)
    return Link(stream, "agent", to_hub, to_agent)


async def answer_call(stream: trio.SocketStream, key: bytes) -> tuple[int, Link]:
    """The hub's side of the handshake: the node rank that the agent proved to have, and the link.

    Raises:
        LinkLost: the other side is no agent, has another version or secret, or went away.
    """
    greeting = _version() + os.urandom(_NONCE)
    await _send_all(stream, greeting)
    theirs = await _receive_exactly(stream, _VERSION.size)
    if not theirs.startswith(_MAGIC):
        raise LinkLost("not an agent of dashinfer_serve")
    if (difference := _difference(theirs)) is not None:
        raise LinkLost(f"it runs another version of dashinfer ({difference})")
    answer = theirs + await _receive_exactly(stream, _NODE.size + _NONCE)
    (node_rank,) = _NODE.unpack_from(answer, _VERSION.size)
    proof = await _receive_exactly(stream, _DIGEST)
    if not hmac.compare_digest(proof, _digest(key, b"agent", greeting, answer)):
        await _send_all(stream, _WRONG_SECRET + bytes(_DIGEST))
        raise LinkLost("it has another --cluster-secret")
    await _send_all(stream, _ACCEPTED + _digest(key, b"hub", greeting, answer, proof))
    to_hub, to_agent = _session_keys(key, greeting, answer)
    return node_rank, Link(stream, "hub", to_agent, to_hub)


def _version() -> bytes:
    return _VERSION.pack(_MAGIC, PROTOCOL, WIRE)


def _difference(theirs: bytes) -> str | None:
    """How the other side's version differs from ours, or None."""
    _, protocol, types = _VERSION.unpack(theirs)
    if protocol != PROTOCOL:
        return f"protocol {protocol}, here {PROTOCOL}"
    return None if types == WIRE else f"messages {types.hex()}, here {WIRE.hex()}"


def _session_keys(key: bytes, greeting: bytes, answer: bytes) -> tuple[bytes, bytes]:
    """For frames to the hub, and to the agent."""
    return _digest(key, b"frames to the hub", greeting, answer), _digest(key, b"frames to the agent", greeting, answer)


def _digest(key: bytes, purpose: bytes, *parts: bytes) -> bytes:
    """The purpose ends with a zero byte, so that none begins as another one does; parts have fixed sizes."""
    return hmac.digest(key, b"".join((purpose, b"\0", *parts)), "sha256")


async def _mac(key: bytes, place: int, length: bytes | bytearray, body: bytes) -> bytes:
    data = b"".join((_PLACE.pack(place), length, body))
    if len(body) < _SLOW:
        return hmac.digest(key, data, "sha256")
    return await trio.to_thread.run_sync(hmac.digest, key, data, "sha256")


async def _send_all(stream: trio.SocketStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError:
        raise LinkLost("the connection is closed") from None


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Never more than asked for: what follows belongs to whoever reads next."""
    data = b""
    while len(data) < size:
        more = await _receive_some(stream, size - len(data))
        if not more:
            raise LinkLost("the connection is closed")
        data += more
    return data


async def _receive_some(stream: trio.SocketStream, size: int | None = None) -> bytes:
    try:
        return bytes(await stream.receive_some(size))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return b""
