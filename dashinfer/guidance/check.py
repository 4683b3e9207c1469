"""`python -m dashinfer.guidance.check`: tries grammars, in a process that may crash or be killed over one.

Reads a grammar a line as a JSON string, and answers each with a line of JSON: `{"grammar": ...}`, the grammar as Lark, or
`{"error": ...}`. A grammar passes once it is compiled and a few tokens have been drawn from it, on a stack and with memory that
are less than the server has. Ends when its input does.
"""

import json
import random
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from dashinfer.guidance.matching import new_matcher, to_lark

if TYPE_CHECKING:
    from llguidance import LLTokenizer

STACK = 3 << 20  # bytes; threads of the server have 8 MiB
MEMORY = 1 << 30  # bytes of address space
STEPS = 48  # bytes that are drawn
TOKENS = 1 << 19  # more than any vocabulary has
SLOW = 0.3  # seconds for one mask; most take some microseconds


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which the server answers
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    for line in sys.stdin:
        try:
            answer = {"grammar": check(json.loads(line))}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def check(grammar: str) -> str:
    """The grammar as Lark.

    Raises:
        ValueError: it cannot be used; in one line.
    """
    grammar = to_lark(grammar)
    matcher = new_matcher(_bytes_alone(), grammar)
    draw = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        begun = time.perf_counter()
        allowed = _bytes_in(matcher.compute_bitmask())
        if time.perf_counter() - begun > SLOW:
            raise ValueError("it is too complex: finding the tokens that it allows takes too long")
        if not allowed:
            break
        matcher.consume_token(draw.choice(allowed))
    if matcher.is_error():
        raise ValueError(_one_line(matcher.get_error()))
    return grammar


@cache
def _bytes_alone() -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()))


class _Bytes:
    """The vocabulary of bytes, with numbers for as many other tokens as a model may have, which grammars may name."""

    def __init__(self) -> None:
        bytes_ = [bytes([byte]) for byte in range(256)]
        self.tokens = [*bytes_, b"<end>", *[b""] * (TOKENS - len(bytes_) - 1)]
        self.special_token_ids = [256]
        self.eos_token_id = 256
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def _bytes_in(mask: bytes) -> list[int]:
    return [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]


def _one_line(message: str) -> str:
    """The first line, which says where, and for a regular expression the last, which says what."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it cannot be compiled"]
    line = lines[0].removesuffix("<non-verbose/>").replace("failed to compile JSON schema: ", "")
    if line.endswith("regex parse error:"):
        line += next((line.removeprefix("error:") for line in lines if line.startswith("error:")), "")
    return line[:300]


if __name__ == "__main__":
    main()
