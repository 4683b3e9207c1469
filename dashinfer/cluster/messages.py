"""What machines tell each other, besides the frames of ranks, which pass through as they are: msgspec Structs.

A connection is for one rank. The agent says `Join` and waits; a frame from the hub, which holds a `Start` of `dashinfer.types`,
begins the rank's life, and the connection's end, from either side, ends it.
"""

import hashlib

import msgspec
from msgspec import Struct

from dashinfer.types import ModelFiles

# Raised by every change that an older version would not understand, such as of the handshake or of what ranks tell each other;
# changes of message types are noticed by `wire`.
PROTOCOL = 2


class Join(Struct, tag="join", frozen=True):
    """Agent to hub, first message: there is room for one rank."""

    agent: bytes  # random, the same for all connections of an agent's life
    nnodes: int
    ranks: int  # on each machine
    model: str
    fingerprint: str  # of the model's configuration
    port: int  # free on the agent's machine, for ranks to meet at


def fingerprint(files: ModelFiles) -> str:
    """What the files of a model on two machines have in common: format and configuration, not their places."""
    return hashlib.sha256(msgspec.json.encode([files.format, files.config], order="deterministic")).hexdigest()


class Welcome(Struct, tag="welcome", frozen=True):
    """Hub to agent: it may wait here for a rank to start."""


class Refusal(Struct, tag="refusal", frozen=True):
    """Hub to agent: it may not, and the connection is closed."""

    reason: str
    final: bool  # asking again is useless


class Ping(Struct, tag="ping", frozen=True):
    """Either way, once a second."""


class Line(Struct, tag="line", frozen=True):
    """Agent to hub: a line that the rank wrote."""

    text: str


class Ended(Struct, tag="ended", frozen=True):
    """Agent to hub: the rank's life is over. `kind` names a class of `dashinfer.errors`."""

    kind: str
    message: str


FromHub = Welcome | Refusal | Ping
FromAgent = Join | Ping | Line | Ended
