"""Sequences that follow a grammar, through the engine: with others, when memory runs out, when workers are replaced."""

import json
import re
import time
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine import masking
from dashinfer.engine.engine import Engine
from dashinfer.errors import InvalidRequest, WorkerError
from dashinfer.guidance.compiler import Compiler
from dashinfer.guidance.guide import Grammar, Guide
from dashinfer.guidance.spec import Constraint
from dashinfer.types import ModelFiles, SamplingParams
from dashinfer.worker.supervisor import one_error

from .random_workers import RandomWorkers

FILES = ModelFiles("random", "safetensors", (), {})
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 5}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture
async def grammar(byte_level):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    yield await compiler.compile(Constraint.from_schema(SCHEMA, "p"))
    compiler.close()


@asynccontextmanager
async def running(*workers: RandomWorkers, **settings):
    """An engine with these groups of workers, one after the other."""
    groups = list(workers)
    with trio.fail_after(60), one_error():
        async with trio.open_nursery() as nursery:
            config = ServerConfig(model="random", **{"max_batch": 4, **settings})
            engine = Engine(config, FILES, make_workers=lambda _: groups.pop(0))
            await nursery.start(engine.run)
            yield engine
            nursery.cancel_scope.cancel()


def params(tokenizer, **others) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 300, "seed": 0, "stop_token_ids": tokenizer.eos_token_ids, **others})


async def collect(engine: Engine, prompt: list[int], each: list[SamplingParams], grammar: Grammar | None = None) -> dict:
    """Tokens of each choice, and its finish."""
    found: dict[int, list] = {index: [] for index in range(len(each))}
    with engine.submit(prompt, each, None, grammar) as generation:
        while outputs := await generation.receive():
            for output in outputs:
                found[output.index] += [output.token] if output.finish != "stop" else []
                found[output.index] += [output.finish] if output.finish else []
    return found


def check(found: dict, tokenizer) -> None:
    for *tokens, finish in found.values():
        assert finish == "stop"
        value = json.loads(tokenizer.decode(tokens))
        assert type(value["a"]) is int and set(value["b"]) <= {"x", "y"}


async def test_choices_and_requests_of_other_kinds_share_steps(byte_level, grammar):
    results: dict = {}
    workers = RandomWorkers(byte_level)

    async def ask(number: int, which: Grammar | None) -> None:
        results[number] = await collect(
            engine, [number] * 20, [params(byte_level, max_tokens=40 if which is None else 300)] * 3, which
        )

    async with running(workers, max_batch=5) as engine, trio.open_nursery() as requests:
        for number in range(12):
            requests.start_soon(ask, number, grammar if number % 2 else None)

    for number in range(1, 12, 2):
        check(results[number], byte_level)
    assert workers.masked > 50
    assert (engine.stats().running, engine.stats().used_blocks) == (0, 0)


@pytest.mark.parametrize("exhausted", [None, 2, 3, 4, 7])
async def test_forced_tokens_are_computed_together(byte_level, exhausted):
    """What the ranks have of each sequence is what was received."""
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    grammar = await compiler.compile(Constraint('start: (/[a-c]/ "XYZ-0123456789/" | /[d-f]/ "::" )+ "END-OF-TEXT"', "p"))
    compiler.close()
    workers = RandomWorkers(byte_level, exhausted=exhausted, num_blocks=40)
    each = params(byte_level, max_tokens=200)
    async with running(workers, max_batch=4, disable_prefix_cache=True) as engine:
        found = await collect(engine, [1, 2], [each] * 6, grammar)
        with_logprobs = await collect(engine, [1, 2], [params(byte_level, max_tokens=200, logprobs=0)], grammar)
        generated = engine.stats().generated_tokens

    assert workers.jumps > 5
    assert engine.stats().used_blocks == 0
    counts = 0
    for *tokens, finish in (*found.values(), *with_logprobs.values()):
        text = byte_level.decode(tokens)
        counts += len(tokens) + (finish == "stop")
        if finish == "stop":
            assert re.fullmatch("([a-c]XYZ-0123456789/|[d-f]::)+END-OF-TEXT", text)
            assert (1, 2, *tokens, byte_level.eos_token_ids[0]) in workers.said
        else:
            assert len(tokens) == 200
    assert generated == counts


async def test_preempted_sequences_go_on(byte_level):
    compiler = Compiler(byte_level, byte_level.vocab_size, max_waiting=10)
    grammar = await compiler.compile(Constraint.from_regex("([a-z]{2}[0-9]){50}", "p"))
    compiler.close()
    async with running(RandomWorkers(byte_level, num_blocks=26), max_batch=8, disable_prefix_cache=True) as engine:
        found = await collect(engine, [1], [params(byte_level)] * 8, grammar)
        preemptions = engine.stats().preemptions

    assert preemptions > 0
    texts = [byte_level.decode(tokens) for *tokens, finish in found.values() if finish == "stop"]
    assert len(texts) == 8 and all(re.fullmatch("([a-z]{2}[0-9]){50}", text) for text in texts)


@pytest.mark.parametrize("step", [0, 1, 5, 6])
async def test_after_memory_ran_out_what_is_known_is_followed(byte_level, grammar, step):
    async with running(RandomWorkers(byte_level, exhausted=step)) as engine:
        check(await collect(engine, [1], [params(byte_level)] * 3, grammar), byte_level)


@pytest.mark.parametrize("step", [0, 1, 5, 6])
async def test_workers_that_are_replaced_follow_on(byte_level, grammar, step):
    async with running(RandomWorkers(byte_level, dies=step), RandomWorkers(byte_level)) as engine:
        check(await collect(engine, [1], [params(byte_level)] * 3, grammar), byte_level)


class DyingWorkers(RandomWorkers):
    async def run(self, **callbacks) -> None:
        self.end = trio.Event()
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(super().run, **callbacks))
                await self.end.wait()
                raise WorkerError("a test")


async def test_workers_that_fail_while_masks_are_computed_are_replaced(byte_level, grammar, monkeypatch):
    mask, count = Guide.mask, 0

    def slowly(guide: Guide) -> bytes:
        nonlocal count
        count += 1
        found = mask(guide)
        if count == 6:  # in a thread
            trio.from_thread.run_sync(workers.end.set)
            time.sleep(0.1)
        guide.slow = True
        return found

    monkeypatch.setattr(Guide, "mask", slowly)
    workers = DyingWorkers(byte_level)
    async with running(workers, RandomWorkers(byte_level)) as engine:
        check(await collect(engine, [1], [params(byte_level)] * 2, grammar), byte_level)
        assert engine.stats().restarts == 1


async def test_max_tokens_ends_what_is_not_complete(byte_level, grammar):
    async with running(RandomWorkers(byte_level)) as engine:
        [found] = (await collect(engine, [1], [params(byte_level, max_tokens=3)], grammar)).values()

    assert len(found) == 4 and found[-1] == "length"


async def test_the_end_comes_whatever_the_request_says_of_it(byte_level, grammar):
    each = params(byte_level, stop_token_ids=(), min_tokens=290)  # ignore_eos
    async with running(RandomWorkers(byte_level)) as engine:
        check(await collect(engine, [1], [each] * 2, grammar), byte_level)


async def test_a_choice_that_is_stopped_leaves_the_others(byte_level, grammar):
    async with running(RandomWorkers(byte_level)) as engine:
        finishes = []
        with engine.submit([1], [params(byte_level)] * 2, None, grammar) as generation:
            generation.stop(0)
            while outputs := await generation.receive():
                finishes += [(output.index, output.finish) for output in outputs if output.finish]

    assert finishes == [(1, "stop")]


async def test_a_grammar_that_is_too_much_work_ends_its_own_request(byte_level, grammar, monkeypatch):
    """The fourth mask of one request is an error; of another it never comes."""
    monkeypatch.setattr(masking, "TIMEOUT", 0.2)
    counts: dict[Guide, int] = {}
    ill: dict[Guide, str] = {}
    mask = Guide.mask

    def counted(guide: Guide) -> bytes:
        counts[guide] = counts.get(guide, 0) + 1
        if counts[guide] == 3 and guide.param != "p":
            guide.slow = True
        elif counts[guide] == 4 and guide.param == "late":
            time.sleep(0.6)
        elif counts[guide] == 4 and guide.param == "wrong":
            guide.error = "too many items"
        slow, found = guide.slow, mask(guide)
        guide.slow = slow
        return found

    monkeypatch.setattr(Guide, "mask", counted)
    named = {
        name: Grammar(grammar._matcher, ends=grammar.ends, vocab_size=byte_level.vocab_size, param=name)
        for name in ("late", "wrong")
    }

    async def fail(name: str, reason: str) -> None:
        with pytest.raises(InvalidRequest, match=f"`{name}` is too complex to follow: {reason}") as error:
            await collect(engine, [1], [params(byte_level)], named[name])
        ill[name] = error.value.param

    async with running(RandomWorkers(byte_level), max_batch=8) as engine, trio.open_nursery() as requests:
        requests.start_soon(fail, "late", "its masks take longer than 0.2 s")
        requests.start_soon(fail, "wrong", "too many items")
        check(await collect(engine, [2], [params(byte_level)] * 3, grammar), byte_level)

    assert ill == {"late": "late", "wrong": "wrong"}
    assert engine.stats().used_blocks == 0
