"""The wire between the parent and a rank: msgpack frames behind a four-byte little-endian length. On both sides; never pickles.

Knows bytes and Structs, no sockets: `encode` makes a frame, a `FrameReader` takes bytes as they come and gives what they hold.
"""

import struct
from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from dashinfer.errors import WorkerError
from dashinfer.types import MAX_FRAME_BYTES, FromParent, FromWorker

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()

T = TypeVar("T")


def encode(message: FromParent | FromWorker) -> bytes:
    """A whole frame, ready to send."""
    buffer = bytearray(_LENGTH.size)
    _encoder.encode_into(message, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, len(buffer) - _LENGTH.size)
    return bytes(buffer)


class FrameReader(Generic[T]):
    """Cuts a stream of bytes into messages of one type."""

    def __init__(self, message_type: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        """Yield the messages that `data` completes.

        Raises:
            WorkerError: the bytes are not a frame of this wire.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise WorkerError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                message = self._decoder.decode(frame)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise WorkerError(f"a frame does not decode: {error}") from None
            yield message


def parent_reader() -> "FrameReader[FromWorker]":
    """For what a rank sends."""
    return FrameReader(FromWorker)  # type: ignore[arg-type]


def worker_reader() -> "FrameReader[FromParent]":
    """For what the parent sends."""
    return FrameReader(FromParent)  # type: ignore[arg-type]
