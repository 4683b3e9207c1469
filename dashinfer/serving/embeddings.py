"""One request for embeddings, from the body's bytes to the answer's. Each text is a request of its own to the engine."""

import math
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from dashinfer.engine.api import EngineAPI, Generation
from dashinfer.errors import InvalidRequest
from dashinfer.protocol.embeddings import EmbeddingRequest, embedding_list_body
from dashinfer.protocol.parse import parse_request
from dashinfer.serving.completions import prompt_tokens
from dashinfer.serving.context import take_places
from dashinfer.serving.service import Service, TextModel
from dashinfer.types import SamplingParams


async def embeddings(service: Service, body: bytes | bytearray, stack: ExitStack) -> tuple[bytes, str]:
    """The answer to an `EmbeddingRequest`, and what the access log says of it.

    Args:
        stack: the request's life; its closing drops the request from the engine.

    Raises:
        RequestError: any of the 400s, 404, 429, 503.
    """
    engine, text = service.require()
    size = len(body)
    request, prompts = await service.off_the_loop(size, partial(_begin, service, engine, text, body))
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0, pooling=request.pooling)  # the token is dropped
    most = min(len(prompts), max(1, service.config.max_queue // 2))  # more would take the whole queue, or not fit into it
    together = take_places(1, most)
    vectors: list[bytes] = []
    waiting: deque[Generation] = deque()
    for prompt in prompts:
        if len(waiting) == together:
            vectors.append(await _vector(waiting.popleft(), request))
        waiting.append(stack.enter_context(engine.submit(prompt, [params])))
    for generation in waiting:
        vectors.append(await _vector(generation, request))
    total = sum(map(len, prompts))
    encode = partial(_encode, service, request, vectors, total)
    return await service.off_the_loop(sum(map(len, vectors)), encode), f"{total} tokens in"


async def _vector(generation: Generation, request: EmbeddingRequest) -> bytes:
    while await generation.receive():
        pass
    assert generation.embedding is not None, "asked for and not delivered"
    size = len(generation.embedding) // 4
    if request.dimensions is not None and request.dimensions > size:
        raise InvalidRequest(f"`dimensions` is {request.dimensions}; the model's embeddings have {size}", param="dimensions")
    return generation.embedding


def _begin(
    service: Service, engine: EngineAPI, text: TextModel, body: bytes | bytearray
) -> tuple[EmbeddingRequest, list[list[int]]]:
    request = parse_request(EmbeddingRequest, body)
    service.check_model(request.model)
    special = request.add_special_tokens
    return request, [prompt_tokens(engine, text, each, "input", add_special_tokens=special) for each in request.input]


def _encode(service: Service, request: EmbeddingRequest, vectors: Sequence[bytes], total: int) -> bytes:
    scaled = [_scaled(array("f", vector)[: request.dimensions]) for vector in vectors]
    floats = request.encoding_format == "float"
    return embedding_list_body(scaled, floats=floats, model=service.config.model_name, prompt_tokens=total)


def _scaled(vector: array) -> bytes:
    """To length 1; zero stays."""
    length = math.sqrt(sum(value * value for value in vector))
    return array("f", [value / length for value in vector]).tobytes() if length else vector.tobytes()
