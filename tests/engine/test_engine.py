"""The engine with a real worker process whose model is fake: every token is known beforehand."""

import sys
import time
from collections import deque
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine import engine as engine_module
from dashinfer.engine.engine import Engine
from dashinfer.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    QueueFull,
    UnsupportedModel,
    WorkerError,
)
from dashinfer.types import ModelFiles, Ready, SamplingParams
from dashinfer.worker.supervisor import WorkerGroup, one_error

from .fake_rank import FakeRank, continuation, show
from .fake_workers import Chaos

FAKE_WORKER = Path(__file__).parents[1] / "worker" / "fake_worker.py"
FILES = ModelFiles("fake", "safetensors", (), {})


def params(max_tokens: int = 8, stop: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=stop)


def new_engine(mode: str = "good", **settings) -> Engine:
    config = ServerConfig(model="fake", **{"max_batch": 4, **settings})
    return Engine(config, FILES, make_workers=partial(WorkerGroup, command=[sys.executable, str(FAKE_WORKER), mode]))


@asynccontextmanager
async def running(mode: str = "good", **settings):
    with trio.fail_after(30), one_error():
        async with trio.open_nursery() as nursery:
            engine = new_engine(mode, **settings)
            await nursery.start(engine.run)
            yield engine
            nursery.cancel_scope.cancel()


async def generate(engine: Engine, prompt: list[int], each: SamplingParams) -> list[int]:
    tokens = []
    with engine.submit(prompt, [each]) as generation:
        while outputs := await generation.receive():
            tokens += [output.token for output in outputs]
    return tokens


async def test_tokens_come_in_order_and_the_last_one_says_why():
    async with running() as engine:
        outputs = []
        with engine.submit([1, 2, 3], [params(5)]) as generation:
            while more := await generation.receive():
                outputs += more
        stats = engine.stats()

    assert [output.token for output in outputs] == continuation([1, 2, 3], params(5))
    assert [output.finish for output in outputs] == [None, None, None, None, "length"]
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (3, 5)


async def test_many_requests_at_once_do_not_disturb_each_other():
    results = {}

    async def request(number: int) -> None:
        results[number] = await generate(engine, [number, number + 1], params(12))

    async with running(max_batch=3) as engine, trio.open_nursery() as requests:
        for number in range(20):
            requests.start_soon(request, number)

    assert results == {number: continuation([number, number + 1], params(12)) for number in range(20)}


async def test_the_choices_of_a_request_are_told_apart_and_one_can_be_stopped():
    received: dict[int, int] = {0: 0, 1: 0, 2: 0}
    async with running("slow") as engine:
        with engine.submit([1], [params(20), params(3), params(6)]) as generation:
            while outputs := await generation.receive():
                for output in outputs:
                    received[output.index] += 1
                if received[0] == 2:
                    generation.stop(0)

    assert received == {0: 2, 1: 3, 2: 6}


async def test_the_time_in_the_queue_is_told():
    async with running(max_batch=1) as engine:
        with engine.submit([1], [params(50)]) as first, engine.submit([2], [params(2)]) as second:
            assert (first.queue_time, second.queue_time) == (None, None)
            await first.receive()
            assert second.queue_time is None
            while await first.receive():
                pass
            await second.receive()

    assert 0 <= first.queue_time < second.queue_time


async def test_leaving_the_block_frees_everything():
    async with running("slow") as engine:
        with engine.submit([1, 2], [params(50)] * 2) as generation:
            await generation.receive()
            assert engine.stats().running == 2

        assert engine.stats().running == 0
        assert engine.stats().used_blocks == 0
        await engine.drained()


async def test_a_cancelled_reader_frees_everything():
    async with running("slow") as engine:
        with trio.move_on_after(0.2):
            await generate(engine, [1, 2], params(60))

        assert engine.stats().running == 0
        assert await generate(engine, [3], params(2)) == continuation([3], params(2))


async def test_a_full_queue_refuses_and_keeps_what_it_has():
    async with running("slow", max_batch=1, max_queue=1) as engine:
        with engine.submit([1], [params(40)]) as first:
            await first.receive()
            with engine.submit([2], [params(2)]):
                with pytest.raises(QueueFull, match=r"^1 of at most 1 requests are waiting already") as refusal:
                    engine.submit([3], [params(2)])

                assert refusal.value.retry_after == 1
                assert engine.stats().waiting == 1


async def test_the_queue_counts_requests_of_which_nothing_runs_and_not_choices():
    async with running("slow", max_batch=1, max_queue=1) as engine:
        with engine.submit([1], [params(40)] * 3) as first:  # one choice runs, two wait
            await first.receive()
            with engine.submit([2], [params(2)] * 5):
                with pytest.raises(QueueFull):
                    engine.submit([3], [params(2)])

                assert engine.stats().waiting == 7


async def test_the_queue_is_bounded_where_blocks_are_scarce_and_not_slots():
    async with running("slow", max_batch=8, max_queue=1) as engine:
        with ExitStack() as stack:
            for number in range(5):  # of 16 blocks each in the end, out of 64
                generation = stack.enter_context(engine.submit([number] * 40, [params(24)]))
            await generation.receive()
            stack.enter_context(engine.submit([6] * 40, [params(24)]))
            with pytest.raises(QueueFull):
                engine.submit([7], [params(1)])

            assert (engine.stats().running, engine.stats().waiting) == (5, 1)


async def test_requests_that_arrive_together_are_taken_as_far_as_there_are_places():
    async with running("slow", max_batch=4, max_queue=1) as engine:
        with ExitStack() as stack:
            for number in range(5):
                stack.enter_context(engine.submit([number], [params(4)]))
            with pytest.raises(QueueFull):
                engine.submit([6], [params(4)])


async def test_the_queue_counts_who_waits_for_one_that_is_computed_alone(autojump_clock):
    """Slots and blocks are free meanwhile."""
    engine = failing_engine([(3, "die"), (3, "die")], max_queue=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        with engine.submit([1], [params(4)]), engine.submit([2], [params(4)]):
            while (engine.stats().restarts, engine.stats().running) != (2, 1):
                await trio.sleep(0.1)
            with engine.submit([3], [params(4)]):
                with pytest.raises(QueueFull, match="1 of at most 1 requests"):
                    engine.submit([4], [params(4)])
                assert engine.stats().waiting == 2
        assert await generate(engine, [5], params(4)) == continuation([5], params(4))
        nursery.cancel_scope.cancel()


async def test_a_request_without_finite_logits_fails_alone():
    """The fake model fails after the token 49."""
    healthy = [[number] for number in range(40) if 49 not in continuation([number], params(10))][:3]
    results = {}

    async def request(prompt: list[int]) -> None:
        results[tuple(prompt)] = await generate(engine, prompt, params(10))

    async def failing(prompt: list[int]) -> None:
        message = "no finite logits; try --data-type float32 or bfloat16"
        both = [params(10)] * 2  # fail in one step
        with engine.submit(prompt, both) as generation, pytest.raises(InternalError, match=message):
            while await generation.receive():
                pass

    async with running("overflow") as engine, trio.open_nursery() as requests:
        for prompt in healthy:
            requests.start_soon(request, prompt)
        requests.start_soon(failing, [1, 49])
        requests.start_soon(failing, [2, 49])

    assert results == {tuple(prompt): continuation(prompt, params(10)) for prompt in healthy}
    assert (engine.stats().running, engine.stats().waiting, engine.stats().used_blocks) == (0, 0, 0)


async def test_bad_prompts_are_refused():
    async with running() as engine:
        with pytest.raises(ContextLengthExceeded, match="64 tokens"):
            engine.submit([1] * 64, [params(1)])
        with pytest.raises(InvalidRequest, match="no tokens"):
            engine.submit([], [params(1)])
        with pytest.raises(InvalidRequest, match="vocabulary"):
            engine.submit([50], [params(1)])


async def test_a_draining_engine_finishes_what_runs_and_takes_no_more():
    async with running("slow") as engine:
        with engine.submit([1], [params(4)]) as generation:
            engine.begin_drain()
            with pytest.raises(EngineUnavailable, match="draining"):
                engine.submit([2], [params(1)])
            count = 0
            while outputs := await generation.receive():
                count += len(outputs)
        await engine.drained()

    assert count == 4


@pytest.mark.parametrize("mode", ["die", "garbage", "hang"])
async def test_a_worker_that_fails_is_replaced_and_no_token_is_lost(mode, caplog):
    results = {}

    async def request(number: int) -> None:
        results[number] = await generate(engine, [number], params(12))

    caplog.set_level("INFO", "dashinfer.engine")
    async with running(mode, step_timeout=0.5) as engine:
        async with trio.open_nursery() as requests:
            for number in range(3):
                requests.start_soon(request, number)
        assert engine.state == "ready"

    assert results == {number: continuation([number], params(12)) for number in range(3)}
    assert engine.stats().generated_tokens == 36
    told = [text for text in caplog.messages if "start again" in text or "ready again" in text]
    assert [text.split(";")[-1].split(" after")[0].strip() for text in told] == ["workers start again", "3 requests go on"]


def failing_engine(faults: list, **settings) -> Engine:
    """On the test's clock, with ranks that fail after so many messages."""
    sizes = {"num_blocks": 64, "block_size": 4, "max_step_tokens": 32}
    ready = Ready("F", "llm", "cpu", "float32", 50, 64, **sizes, weight_bytes=0, kv_cache_bytes=0)
    chaos = Chaos(rank={**sizes, "max_batch": 4}, ready=ready, faults=deque(faults))
    return Engine(ServerConfig(model="fake", max_batch=4, **settings), FILES, make_workers=chaos.make_workers)


async def until_state(engine: Engine, state: str) -> None:
    while engine.state != state:
        await trio.sleep(0.1)


class HastyWorkers:
    """They have a plan's result before the parent has sent all that goes with it, and fail."""

    def __init__(self, ready: Ready, rank: FakeRank) -> None:
        self._ready, self._rank = ready, rank
        self._failed = trio.Event()

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        self._on_result = on_result
        task_status.started(self._ready)
        await self._failed.wait()
        raise WorkerError("died")

    async def send(self, message) -> None:
        self._on_result(self._rank.execute(message))
        self._failed.set()
        await trio.sleep_forever()


async def test_a_result_that_comes_while_workers_fail_counts(autojump_clock):
    engine = failing_engine([])
    make_workers, groups = engine._make_workers, []

    def make_hasty_first(configs):
        groups.append(make_workers(configs))
        chaos = groups[0]._chaos
        return groups[-1] if len(groups) > 1 else HastyWorkers(chaos.ready, FakeRank(**chaos.rank))

    engine._make_workers = make_hasty_first
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        tokens = await generate(engine, [1], params(6))
        nursery.cancel_scope.cancel()

    assert tokens == continuation([1], params(6))


async def test_requests_that_come_while_workers_start_again_wait_in_the_queue(autojump_clock):
    engine = failing_engine([(4, "die")], max_queue=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        nursery.start_soon(generate, engine, [1], params(6))
        await until_state(engine, "recovering")
        with ExitStack() as stack:
            for number in range(4):  # three places beside the one that goes on, and one in the queue
                generation = stack.enter_context(engine.submit([number], [params(2)]))
            with pytest.raises(QueueFull):
                engine.submit([5], [params(2)])
            assert (engine.state, engine.stats().waiting) == ("recovering", 5)
            tokens = []
            while outputs := await generation.receive():
                tokens += [output.token for output in outputs]
        nursery.cancel_scope.cancel()

    assert tokens == continuation([3], params(2))


async def test_an_engine_that_drains_while_workers_start_again_finishes_its_requests(autojump_clock):
    results = []

    async def request() -> None:
        results.append(await generate(engine, [1], params(6)))

    engine = failing_engine([(4, "die")])
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        nursery.start_soon(request)
        await until_state(engine, "recovering")
        engine.begin_drain()
        with pytest.raises(EngineUnavailable, match="draining"):
            engine.submit([2], [params(1)])
        await engine.drained()
        assert engine.state == "draining"
        nursery.cancel_scope.cancel()

    assert results == [continuation([1], params(6))]


async def test_workers_that_come_back_smaller_are_a_failure(autojump_clock, caplog):
    engine = failing_engine([(4, "die")], max_restarts=1)
    make_workers = engine._make_workers

    def make_smaller(configs):
        workers = make_workers(configs)
        if configs[0].num_blocks is not None:
            workers._chaos.ready = msgspec.structs.replace(workers._chaos.ready, num_blocks=63)
        return workers

    engine._make_workers = make_smaller
    with pytest.raises(WorkerError, match="have num_blocks 63, not 64"), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(InternalError):
                await generate(engine, [1], params(6))


@pytest.mark.parametrize("mode", ["die", "killed", "garbage"])
async def test_a_worker_that_is_not_replaced_is_told_to_every_reader_and_ends_the_engine(mode):
    errors = []

    async def read() -> None:
        with pytest.raises(InternalError) as error:
            await generate(engine, [1], params(20))
        errors.append(error.value)

    engine = new_engine(mode, max_restarts=0)
    with trio.fail_after(30), pytest.raises(WorkerError), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            for _ in range(3):
                nursery.start_soon(read)

    assert engine.state == "failed"
    assert len(errors) == 3


async def test_a_hanging_step_is_a_failure():
    engine = new_engine("hang", step_timeout=0.5, max_restarts=0)
    with trio.fail_after(30), pytest.raises(WorkerError, match=r"workers hang: no result of a step for 0\.5 s"), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(InternalError):
                await generate(engine, [1], params(20))

    assert engine.state == "failed"


async def test_an_encode_may_take_long_while_it_goes_on():
    prompt, media = show([1, 2, 3], [(1, 2)])
    async with running("seeing", step_timeout=0.6) as engine:
        with engine.submit(prompt, [params(3)], media) as generation:
            tokens = []
            while outputs := await generation.receive():
                tokens += [output.token for output in outputs]

    assert tokens == continuation(prompt, params(3), media)


async def test_an_encode_without_a_sign_is_a_failure():
    prompt, media = show([1, 2, 3], [(1, 2)])
    engine = new_engine("blind", step_timeout=0.3, max_restarts=0)
    with trio.fail_after(30), pytest.raises(WorkerError, match="no image or video encoded"), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with engine.submit(prompt, [params(3)], media) as generation, pytest.raises(InternalError):
                await generation.receive()


async def test_a_long_step_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "LONG_STEP", 0.1)
    engine = new_engine("hang", step_timeout=0.5, max_restarts=0)
    with trio.fail_after(30), pytest.raises(WorkerError), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(InternalError):
                await generate(engine, [1], params(20))

    assert [text for text in caplog.messages if "has been running" in text] == ["step 2 has been running for 0 s"]


async def test_a_server_that_was_stopped_and_goes_on_is_no_hang():
    """As after Ctrl-Z and fg: when the server comes to itself, every deadline has passed."""
    async with running("slow", step_timeout=0.5) as engine:
        with engine.submit([1], [params(6)]) as generation:
            await generation.receive()
            time.sleep(engine_module.LATE + 0.7)  # noqa: ASYNC251  nothing of this process runs meanwhile
            tokens = 0
            while outputs := await generation.receive():
                tokens += len(outputs)

    assert tokens == 5


async def test_a_broken_invariant_is_not_told_as_a_shutdown(monkeypatch):
    def broken(scheduler, result):
        raise KeyError("a bug")

    engine = new_engine()
    monkeypatch.setattr(engine, "_apply", broken)
    with trio.fail_after(30), pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(InternalError, match="the engine failed"):
                await generate(engine, [1], params(5))

    assert caught.value.split(KeyError)[1] is None
    assert engine.state == "failed"


async def test_a_model_that_cannot_be_loaded_never_becomes_ready():
    engine = new_engine("refuse")
    with trio.fail_after(30), pytest.raises(UnsupportedModel):
        await engine.run()

    assert engine.state == "failed"
    with pytest.raises(EngineUnavailable):
        engine.submit([1], [params(1)])


async def test_shutting_down_tells_the_readers():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            engine = new_engine("slow")
            await nursery.start(engine.run)
            with (
                engine.submit([1], [params(60)]) as generation,
                trio.CancelScope(shield=True),
                pytest.raises(EngineUnavailable),
            ):
                nursery.cancel_scope.cancel()
                while await generation.receive():
                    pass


class TimedWorkers:
    """In the place of the worker group: a step takes a second a token, on the test's clock. `sent` has (time, plan)."""

    def __init__(self) -> None:
        self.sent: list = []
        self._send, self._receive = trio.open_memory_channel(10)

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        ready = Ready("F", "llm", "cpu", "float32", 50, 64, 32, 4, 64, 0, 0)
        rank = FakeRank(num_blocks=64, block_size=4, max_batch=4, max_step_tokens=32)
        task_status.started(ready)
        async for plan in self._receive:
            await trio.sleep(sum(chunk.length for chunk in plan.chunks))
            on_result(rank.execute(plan))

    async def send(self, plan) -> None:
        self.sent.append((trio.current_time(), plan))
        await self._send.send(plan)


async def test_what_arrives_during_a_long_step_is_in_the_next_one(autojump_clock):
    workers = TimedWorkers()
    engine = Engine(ServerConfig(model="fake", max_batch=4), FILES, make_workers=lambda configs: workers)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        start = trio.current_time()
        for arrival in (0, 60, 67):
            await trio.sleep_until(start + arrival)
            nursery.start_soon(generate, engine, [arrival % 50] * 20, params(2))
        await trio.sleep_until(start + 200)
        nursery.cancel_scope.cancel()

    entered = [time - start for time, plan in workers.sent for _ in plan.enter]
    # The second prompt takes 20 s, as the first one did: what follows it is planned after four fifths of that.
    assert entered == [0, 60, pytest.approx(60 + 0.8 * 20, abs=0.1)]
    assert [time - start for time, _ in workers.sent[:2]] == [0, 0]  # of the first one nobody knew


async def test_a_step_is_waited_for_twice_at_most(monkeypatch):
    waits = []
    wait = Engine._wait

    async def counted(self, *arguments):
        waits.append(arguments)
        await wait(self, *arguments)

    monkeypatch.setattr(Engine, "_wait", counted)
    async with running("slow") as engine:
        await generate(engine, [1], params(16))

    assert len(waits) <= 2 * 16 + 4  # until the next step is planned, and until the result
