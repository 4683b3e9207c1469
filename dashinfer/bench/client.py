"""One streamed request at a time: sent, timed, counted. Knows OpenAI's wire format and where servers differ from it.

Every failure of a request becomes a `Sample` with an `error`: a measurement counts errors, it does not stop at them. `probe`
raises BenchError instead, before anything is measured.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from dashinfer.bench.exchange import Connect, Recording, exchange, open_stream
from dashinfer.bench.stats import Sample
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

Content = str | list[dict[str, Any]]  # of a message: text, or parts as OpenAI's API has them
Endpoint = Literal["chat", "completions"]

QUESTION = "What is the capital of France?"

_USAGE = {"stream_options": {"include_usage": True}}
# What a server may be asked for beyond the common fields, best first. Servers differ in what they refuse.
DIALECTS: dict[str, dict[str, Any]] = {
    "full length": {**_USAGE, "ignore_eos": True},
    "usage": _USAGE,
    "plain": {},
}


class EventParser:
    """Server-sent events from bytes, whatever way the network cuts them.

    Splits at newline bytes alone: JSON text may hold U+2028 and the like unescaped, which `str.splitlines` takes for line ends.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of `data:` lines that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class _Answer:
    """Collects one stream."""

    def __init__(self) -> None:
        self.times: list[float] = []  # of the pieces
        self.pieces: list[str] = []
        self.usage: dict[str, Any] = {}
        self.ended = False  # a finish_reason or [DONE] was seen
        self.error: str | None = None

    def take(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self.ended = True
            return
        try:
            chunk = json.loads(payload)
        except ValueError:
            self.error = f"a chunk is not JSON: {payload[:80]!r}"
            return
        if not isinstance(chunk, dict):
            self.error = f"a chunk is not an object: {payload[:80]!r}"
        elif "error" in chunk:
            self.error = f"error in the stream: {str(chunk['error'])[:200]}"
        else:
            try:
                self._take_chunk(chunk, now)
            except (AttributeError, TypeError):
                self.error = f"a chunk has another shape than OpenAI's: {payload[:80]!r}"

    def _take_chunk(self, chunk: dict[str, Any], now: float) -> None:
        """Raises AttributeError or TypeError where it has another shape than OpenAI's."""
        usage = chunk.get("usage") or self.usage
        if not isinstance(usage, dict):
            raise TypeError
        self.usage = usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            if text:
                if not isinstance(text, str):
                    raise TypeError
                self.times.append(now)
                self.pieces.append(text)
            if choice.get("finish_reason"):
                self.ended = True

    def sample(self, started: float, finished: float) -> Sample:
        tokens = self.usage.get("completion_tokens")
        error = self.error
        if error is None and not self.ended:
            error = "the stream broke off"
        return Sample(
            started=started,
            finished=finished,
            first=self.times[0] if self.times else None,
            last=self.times[-1] if self.times else None,
            gaps=tuple(later - earlier for earlier, later in itertools.pairwise(self.times)),
            output_tokens=len(self.pieces) if tokens is None else tokens,
            counted_by_usage=tokens is not None,
            prompt_tokens=self.usage.get("prompt_tokens"),
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            text="".join(self.pieces),
            error=error,
        )


def _headers(target: Target) -> dict[str, str]:
    return ({"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}) | target.headers


async def record(
    target: Target,
    prompt: Content,
    max_tokens: int,
    extra: dict[str, Any],
    limit: float,
    connect: Connect = open_stream,
    *,
    endpoint: Endpoint = "chat",
    before: Sequence[dict[str, Any]] = (),
) -> Recording:
    """Sends one greedy streaming request and notes the whole answer, for `read_answer` to parse.

    Args:
        prompt: the user's message; for completions, text.
        extra: the fields of the dialect that the server understands.
        limit: seconds for the whole answer.
        connect: opens the connection.
        before: messages before the user's.
    """
    if endpoint == "chat":
        path, asked = "chat/completions", {"messages": [*before, {"role": "user", "content": prompt}]}
    else:
        path, asked = "completions", {"prompt": prompt}
    body = {
        "model": target.model,
        **asked,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **extra,
        **target.body,
    }
    headers = {"Content-Type": "application/json", **_headers(target)}
    return await exchange("POST", f"{target.url}/{path}", headers, json.dumps(body).encode(), limit, connect)


def read_answer(recording: Recording) -> Sample:
    """What the request did. To be called once for a recording."""
    response = recording.response()
    answer = _Answer()
    if response.status == 200:
        parser = EventParser()
        for now, data in response.body:
            for payload in parser.feed(data):
                answer.take(payload, now)
    elif response.status is not None:
        answer.error = f"HTTP {response.status}: {response.content.decode(errors='replace')[:200]}"
    answer.error = response.error or answer.error
    return answer.sample(recording.started, recording.finished)


async def ask(
    target: Target,
    prompt: Content,
    max_tokens: int,
    extra: dict[str, Any],
    limit: float,
    connect: Connect = open_stream,
    *,
    endpoint: Endpoint = "chat",
) -> Sample:
    """`record`, then `read_answer` at once."""
    return read_answer(await record(target, prompt, max_tokens, extra, limit, connect, endpoint=endpoint))


async def find_model(target: Target, limit: float, connect: Connect = open_stream) -> str:
    """The first model that the server lists, asked for `limit` seconds. Raises BenchError."""
    advice = f"name the model: --model MODEL, or {target.label}={target.url}=MODEL"
    response = (await exchange("GET", f"{target.url}/models", _headers(target), b"", limit, connect)).response()
    error = response.error or (None if response.status == 200 else f"HTTP {response.status}")
    if error is not None:
        raise BenchError(f"{target.label} ({target.url}) does not list its models ({error}); {advice}")
    try:
        return json.loads(response.content)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise BenchError(f"{target.label} ({target.url}) lists no model; {advice}") from None


async def probe(
    target: Target,
    limit: float,
    connect: Connect = open_stream,
    question: Content = QUESTION,
    endpoint: Endpoint = "chat",
) -> tuple[str, str]:
    """Finds out what the server understands.

    Returns:
        The dialect's name, and the server's greedy answer to the question, for people to look at: a fast server that talks
        nonsense has no figures worth reading.

    Raises:
        BenchError: it does not answer at all.
    """
    refusal = ""
    for name, extra in DIALECTS.items():
        sample = await ask(target, question, 2, extra, limit, connect, endpoint=endpoint)
        if sample.error is None:
            usage = {key: value for key, value in extra.items() if key != "ignore_eos"}
            plain = replace(target, body={})  # as anyone would ask
            answer = await ask(plain, question, 32, usage, limit, connect, endpoint=endpoint)
            if answer.error is not None:
                raise BenchError(f"{target.label} does not answer: {answer.error}")
            return name, answer.text
        refusal = sample.error
        if not refusal.startswith(("HTTP 400", "HTTP 422")):
            break
    raise BenchError(f"{target.label} does not answer: {refusal}")
