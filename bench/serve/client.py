"""One streamed chat request at a time: sent, timed, counted. Knows OpenAI's wire format and where servers differ from it.

Every failure of a request becomes a `Sample` with an `error`: a measurement counts errors, it does not stop at them. `probe`
raises BenchError instead, before anything is measured.
"""

import json
from dataclasses import replace
from typing import Any

import httpx
import trio

from bench.serve.stats import Sample
from bench.serve.target import BenchError, Target

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


def open_client(target: Target, concurrency: int, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """A client with a connection for each of `concurrency` workers. Deadlines are the caller's (`ask`), not httpx's."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    return httpx.AsyncClient(
        base_url=target.url, headers=headers, timeout=None, limits=limits, transport=transport, trust_env=False
    )


class _Answer:
    """Collects one stream."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.chunks = 0
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
        if "error" in chunk:
            self.error = f"error in the stream: {str(chunk['error'])[:200]}"
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content")
            if text:
                self.first = now if self.first is None else self.first
                self.last = now
                self.chunks += 1
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
            first=self.first,
            last=self.last,
            output_tokens=self.chunks if tokens is None else tokens,
            counted_by_usage=tokens is not None,
            prompt_tokens=self.usage.get("prompt_tokens"),
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            text="".join(self.pieces),
            error=error,
        )


async def ask(
    client: httpx.AsyncClient, target: Target, prompt: str, max_tokens: int, extra: dict[str, Any], limit: float
) -> Sample:
    """Sends one greedy streaming request and reads the whole answer.

    Args:
        extra: the fields of the dialect that the server understands.
        limit: seconds for the whole answer.
    """
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **extra,
        **target.body,
    }
    answer = _Answer()
    parser = EventParser()
    started = trio.current_time()
    with trio.move_on_after(limit) as scope:
        try:
            async with client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    answer.error = f"HTTP {response.status_code}: {text[:200]}"
                else:
                    async for data in response.aiter_bytes():
                        now = trio.current_time()
                        for payload in parser.feed(data):
                            answer.take(payload, now)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
    if scope.cancelled_caught:
        answer.error = f"no complete answer within {limit:g} s"
    return answer.sample(started, trio.current_time())


async def find_model(client: httpx.AsyncClient, target: Target) -> str:
    """The first model that the server lists. Raises BenchError."""
    advice = f"name the model: {target.label}={target.url}=MODEL"
    try:
        response = await client.get("/models")
        response.raise_for_status()
        return response.json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise BenchError(f"{target.label} does not list its models ({error}); {advice}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise BenchError(f"{target.label} lists no model; {advice}") from None


async def probe(client: httpx.AsyncClient, target: Target, limit: float) -> tuple[str, str]:
    """Finds out what the server understands.

    Returns:
        The dialect's name, and the server's greedy answer to `QUESTION`, for people to look at: a fast server that talks
        nonsense has no figures worth reading.

    Raises:
        BenchError: it does not answer at all.
    """
    refusal = ""
    for name, extra in DIALECTS.items():
        sample = await ask(client, target, QUESTION, 2, extra, limit)
        if sample.error is None:
            usage = {key: value for key, value in extra.items() if key != "ignore_eos"}
            answer = await ask(client, replace(target, body={}), QUESTION, 32, usage, limit)  # as anyone would ask
            if answer.error is not None:
                raise BenchError(f"{target.label} does not answer: {answer.error}")
            return name, answer.text
        refusal = sample.error
        if not refusal.startswith(("HTTP 400", "HTTP 422")):
            break
    raise BenchError(f"{target.label} does not answer: {refusal}")
