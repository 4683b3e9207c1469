"""Whatever a schema is, an output that ends is of it: random tokens under the masks, through the whole engine.

For a longer run `GUIDANCE_SCHEMAS` says how many schemas, and `GUIDANCE_SUITE` names the folder of a draft in the JSON Schema
Test Suite whose schemas are taken instead.
"""

import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import referencing.exceptions
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.errors import InvalidRequest
from dashinfer.guidance.compiler import Compiler
from dashinfer.guidance.spec import Constraint
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.types import ModelFiles, SamplingParams

from .random_workers import RandomWorkers
from .schemas import Schemas

pytestmark = pytest.mark.feature("Structured output", "JSON, JSON Schema")

COUNT = int(os.environ.get("GUIDANCE_SCHEMAS", "60"))
SUITE = os.environ.get("GUIDANCE_SUITE")
FILES = ModelFiles("random", "safetensors", (), {})


async def test_every_output_is_of_its_schema(byte_level: Tokenizer) -> None:
    drawn = suite(Path(SUITE)) if SUITE else drawn_schemas(COUNT)
    count = len(drawn)
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=count)
    config = ServerConfig(model="random", max_batch=16, max_queue=count)
    engine = Engine(config, FILES, make_workers=lambda _: RandomWorkers(byte_level))
    counts = dict.fromkeys(("valid", "long", "refused"), 0)
    wrong = []

    async def one(number: int, limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            await ask(number)

    async def ask(number: int) -> None:
        schema = drawn[number]
        try:
            grammar = await compiler.compile(Constraint.from_schema(schema, "schema"))
        except InvalidRequest:
            counts["refused"] += 1
            return
        finishes = dict.fromkeys(range(2), "")
        tokens: dict[int, list[int]] = {index: [] for index in finishes}
        params = [SamplingParams(max_tokens=400, seed=seed, stop_token_ids=byte_level.eos_token_ids) for seed in finishes]
        with engine.submit([number % 200], params, None, grammar) as generation:
            while outputs := await generation.receive():
                for output in outputs:
                    finishes[output.index] = output.finish or ""
                    if output.finish != "stop":
                        tokens[output.index].append(output.token)
        for index, finish in finishes.items():
            text = byte_level.decode(tokens[index])
            if finish == "length":
                counts["long"] += 1
            elif problem := fault(schema, text):
                wrong.append((schema, text, problem))
            else:
                counts["valid"] += 1

    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            limiter = trio.CapacityLimiter(16)
            async with trio.open_nursery() as requests:
                for number in range(count):
                    requests.start_soon(one, number, limiter)
            nursery.cancel_scope.cancel()
    compiler.close()
    print(counts)

    assert wrong == []
    assert counts["valid"] > count / 2
    assert counts["refused"] < count / 4 or SUITE
    assert engine.stats().used_blocks == 0


def drawn_schemas(count: int) -> list[object]:
    schemas = Schemas(count)
    return [schemas.schema() for _ in range(count)]


def suite(folder: Path) -> list[object]:
    """Each schema once."""
    groups = [group for path in sorted(folder.glob("*.json")) for group in json.loads(path.read_text())]
    return [group["schema"] for group in groups]


def fault(schema: object, text: str) -> str:
    """What is wrong with an output; nothing if it is of the schema, or the schema is one that the judge cannot read."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    errors = jsonschema.Draft202012Validator(schema, format_checker=checker).iter_errors(value)
    try:
        return next((error.message for error in errors), "")
    except (re.error, referencing.exceptions.Unresolvable):
        assert SUITE
        return ""
