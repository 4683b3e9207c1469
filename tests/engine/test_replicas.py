"""Several engines behind one, with fake ranks in the process: a step takes a second on the test's clock."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import fields

import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine, worker_config
from dashinfer.engine.replicas import Replicas, SlowestProgress
from dashinfer.engine.routing import SLACK, WORTH, Outlook, choose
from dashinfer.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InsufficientMemory,
    InternalError,
    InvalidRequest,
    QueueFull,
    WorkerError,
)
from dashinfer.types import Encode, Encoded, Forget, ModelFiles, Progress, Ready, SamplingParams, WorkerConfig
from dashinfer.worker.supervisor import one_error

from .fake_rank import FakeRank, continuation, show

pytestmark = pytest.mark.feature("Parallelism and recovery", "Copies that share the requests")

FILES = ModelFiles("fake", "safetensors", (), {})
READY = Ready("F", "vlm", "cpu", "float32", 100, 64, 32, 4, 64, 0, 0, media_cache_bytes=64, media_token_bytes=1)
PROMPT = list(range(1, 18))  # four blocks and one token


def params(max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0)


class FakeWorkers:
    """In the place of the worker group."""

    def __init__(self, loading: float = 0.0, broken: Exception | None = None) -> None:
        self.plans: list = []
        self.media: list[bytes] = []
        self.broken = broken
        self.end = trio.Event()
        self._loading = loading
        self._send, self._receive = trio.open_memory_channel(100)

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        await trio.sleep(self._loading)
        if self.broken is not None:
            raise self.broken
        rank = FakeRank(num_blocks=64, block_size=4, max_batch=32, max_step_tokens=32, media_tokens=64)
        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._die)
                task_status.started(READY)
                async for message in self._receive:
                    await trio.sleep(1)
                    if isinstance(message, Encode | Forget):
                        rank.tell(message)
                        on_encoded(Encoded(rank.encode(1)))
                    else:
                        on_result(rank.execute(message))

    async def _die(self) -> None:
        await self.end.wait()
        raise WorkerError("rank 0 died")

    async def send(self, message) -> None:
        if isinstance(message, Encode):
            self.media.append(message.key)
        elif not isinstance(message, Forget):
            self.plans.append(message)
        await self._send.send(message)


def make(lives: list[list[FakeWorkers]], **settings) -> Replicas:
    """Of each replica, the workers that it has one after the other."""
    config = ServerConfig(model="fake", data_parallel=len(lives), **{"max_batch": 4, **settings})

    def make_workers(workers: Iterator[FakeWorkers]) -> Callable:
        return lambda configs: next(workers)

    engines = [Engine(config, FILES, make_workers=make_workers(iter(each)), replica=n) for n, each in enumerate(lives)]
    return Replicas(engines, max_queue=config.max_queue, prefix_cache=not config.disable_prefix_cache)


@asynccontextmanager
async def running(count: int = 2, **settings):
    """Replicas that run, and their workers."""
    workers = [FakeWorkers() for _ in range(count)]
    with one_error():
        async with trio.open_nursery() as nursery:
            replicas = make([[each] for each in workers], **settings)
            await nursery.start(replicas.run)
            yield replicas, workers
            nursery.cancel_scope.cancel()


async def finish(generation) -> list[int]:
    tokens = []
    while outputs := await generation.receive():
        tokens += [output.token for output in outputs]
    return tokens


async def generate(replicas: Replicas, prompt: list[int], max_tokens: int = 4, media=None) -> list[int]:
    with replicas.submit(prompt, [params(max_tokens)], media) as generation:
        return await finish(generation)


def places(replicas: Replicas) -> list[int]:
    """Sequences of each replica."""
    return [each.running + each.waiting for each in (replica.stats() for replica in replicas._replicas)]


def outlook(cached: int = 0, sequences: int = 0, tokens: int | None = None, *, admits: bool = True) -> Outlook:
    return Outlook(cached, admits, sequences, sequences if tokens is None else tokens)


@pytest.mark.parametrize(
    ("outlooks", "turn", "expected"),
    [
        pytest.param([outlook(), outlook(1)], 0, 1, id="what is cached"),
        pytest.param([outlook(3, 3), outlook(2, 1)], 0, 0, id="the most, before the load"),
        pytest.param([outlook(2, 2, 50), outlook(2, 3, 3)], 0, 1, id="then the fewest tokens"),
        pytest.param([outlook(), outlook(), outlook()], 1, 1, id="then in turn"),
        pytest.param([outlook(tokens=1), outlook(), outlook(tokens=1)], 2, 1, id="in turn only of the equal"),
        pytest.param([outlook(9, 2, admits=False), outlook(0, 3)], 0, 1, id="no waiting while another is free"),
        pytest.param([outlook(9, 2, admits=False), outlook(1, 3, admits=False)], 0, 0, id="nobody is free"),
        pytest.param([outlook(2, SLACK + 3), outlook(0, 3)], 0, 0, id="as many more as may be"),
        pytest.param([outlook(2, SLACK + 4), outlook(0, 3)], 0, 1, id="too many more"),
        pytest.param([outlook(2 * WORTH, SLACK + 5), outlook(0, 3)], 0, 0, id="as many more as the match is worth"),
        pytest.param([outlook(2 * WORTH, SLACK + 6), outlook(0, 3)], 0, 1, id="too many more for the match"),
        pytest.param([outlook(2, SLACK + 4), outlook(0, 3, admits=False)], 0, 0, id="more than one that is not free"),
    ],
)
def test_the_choice(outlooks, turn, expected):
    assert choose(outlooks, turn) == expected


async def test_requests_are_answered_as_by_one_engine(autojump_clock):
    results = {}

    async def request(number: int) -> None:
        results[number] = await generate(replicas, [number, number + 1], 12)

    async with running(3) as (replicas, workers):
        assert replicas.state == "ready"
        assert replicas.info.num_blocks == 3 * READY.num_blocks
        async with trio.open_nursery() as requests:
            for number in range(30):
                requests.start_soon(request, number)
        stats = replicas.stats()

    assert results == {number: continuation([number, number + 1], params(12)) for number in range(30)}
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)
    assert (stats.total_blocks, stats.prompt_tokens, stats.generated_tokens) == (3 * 64, 60, 360)
    assert all(sum(len(plan.enter) for plan in each.plans) == 10 for each in workers)


async def test_a_shared_prefix_goes_where_it_is_cached(autojump_clock):
    async with running(3) as (replicas, workers):
        await generate(replicas, [50] * 9)
        await generate(replicas, PROMPT)
        with replicas.submit([60] * 9, [params(20)]), replicas.submit([*PROMPT[:9], 70], [params()]) as generation:
            tokens = await finish(generation)

            assert places(replicas) == [0, 0, 1]  # the third waited for its turn and was idle
        assert await generate(replicas, [50] * 9) == continuation([50] * 9, params())

    entered = [sum(len(plan.enter) for plan in each.plans) for each in workers]
    assert tokens == continuation([*PROMPT[:9], 70], params())
    assert generation.cached_tokens == 8
    assert entered == [2, 2, 1]


async def test_a_prompt_with_an_image_goes_where_that_is_cached(autojump_clock):
    async with running(2) as (replicas, workers):
        shown = [show(list(range(12)), [(2, number)]) for number in range(2)]
        for prompt, media in shown:
            await generate(replicas, prompt, 4, media)
        for prompt, media in reversed(shown):
            assert await generate(replicas, prompt, 4, media) == continuation(prompt, params(4), media)

    assert [each.media for each in workers] == [[media.media[0].key] for _, media in shown]


async def test_without_the_prefix_cache_requests_take_turns(autojump_clock):
    async with running(2, disable_prefix_cache=True) as (replicas, workers):
        for _ in range(4):
            await generate(replicas, PROMPT)

    assert [sum(len(plan.enter) for plan in each.plans) for each in workers] == [2, 2]


async def test_a_common_beginning_spreads(autojump_clock):
    async with running(2, max_batch=32) as (replicas, _):
        await generate(replicas, PROMPT[:9], 1)
        async with trio.open_nursery() as requests:
            for number in range(12):
                requests.start_soon(generate, replicas, [*PROMPT[:9], number], 10)
                await trio.sleep(0.7)
            found = places(replicas)
            requests.cancel_scope.cancel()

    assert sum(found) == 12
    assert max(found) <= 7  # the second one computes the beginning too, and from then on it is even


async def test_a_full_replica_loses_to_a_free_one_whatever_it_has_cached(autojump_clock):
    async with running(2, max_batch=1) as (replicas, _):
        await generate(replicas, PROMPT)
        with replicas.submit(PROMPT, [params(30)]) as first:
            await first.receive()

            assert places(replicas) == [1, 0]
            with replicas.submit(PROMPT, [params(10)]) as second:
                await second.receive()

                assert places(replicas) == [1, 1]
                with replicas.submit([*PROMPT, 1, 2, 3], [params(1)]):  # both are full, and both have it
                    assert sorted(places(replicas)) == [1, 2]


async def test_the_queue_is_full_when_all_replicas_together_are(autojump_clock):
    async with running(2, max_batch=1, max_queue=3) as (replicas, _):
        with ExitStack() as stack:
            running_ones = [stack.enter_context(replicas.submit([number], [params(20)])) for number in range(2)]
            for generation in running_ones:
                await generation.receive()
            for number in range(3):
                stack.enter_context(replicas.submit([number + 10], [params(20)]))
            with pytest.raises(QueueFull, match=r"^3 of at most 3 requests") as refusal:
                replicas.submit([20], [params()])

            assert refusal.value.retry_after == 1
            assert sorted(places(replicas)) == [2, 3]


async def test_a_full_queue_of_one_replica_refuses_nothing_that_another_runs_at_once(autojump_clock):
    async with running(2, max_batch=1, max_queue=1) as (replicas, _):
        with ExitStack() as stack:
            first = stack.enter_context(replicas.submit([1], [params(40)]))
            with replicas.submit([2], [params(40)]) as second:
                await first.receive()
                await second.receive()
                stack.enter_context(replicas.submit([3], [params(40)]))
                with pytest.raises(QueueFull):
                    replicas.submit([4], [params()])
            assert await generate(replicas, [5]) == continuation([5], params())


@pytest.mark.parametrize(
    ("prompt", "error"), [([], InvalidRequest), ([1] * 64, ContextLengthExceeded), ([2**40], InvalidRequest)]
)
async def test_bad_prompts_are_refused(prompt, error, autojump_clock):
    async with running() as (replicas, _):
        with pytest.raises(error):
            replicas.submit(prompt, [params()])


async def test_ready_is_told_when_all_are_loaded(autojump_clock):
    replicas = make([[FakeWorkers(loading=1)], [FakeWorkers(loading=5)]])
    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        nursery.start_soon(nursery.start, replicas.run)
        await trio.sleep(3)

        assert replicas.state == "loading"
        with pytest.raises(EngineUnavailable, match="loading"):
            replicas.submit([1], [params()])
        while replicas.state == "loading":
            await trio.sleep(0.1)
        assert trio.current_time() - start == pytest.approx(5, abs=0.2)
        assert replicas.state == "ready"
        nursery.cancel_scope.cancel()


async def test_one_that_cannot_load_ends_all(autojump_clock):
    replicas = make([[FakeWorkers()], [FakeWorkers(loading=2, broken=InsufficientMemory("no room"))]])
    with pytest.raises(InsufficientMemory):
        await replicas.run()

    assert replicas.state == "failed"


async def test_one_that_fails_for_good_ends_all(autojump_clock):
    workers = FakeWorkers()
    replicas = make([[FakeWorkers()], [workers]], max_restarts=0)
    told = []

    async def read(prompt: list[int]) -> None:
        with pytest.raises((InternalError, EngineUnavailable)) as error:
            await generate(replicas, prompt, 40)
        told.append(error.value)

    with pytest.raises(WorkerError, match="rank 0 died"), one_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(replicas.run)
            for number in range(4):
                nursery.start_soon(read, [number])
            await trio.sleep(3)
            workers.end.set()

    assert replicas.state == "failed"
    assert len(told) == 4


async def test_draining_finishes_what_runs_in_all(autojump_clock):
    async with running() as (replicas, _):
        counts = []

        async def read(number: int) -> None:
            with replicas.submit([number], [params(10)]) as generation:
                counts.append(len(await finish(generation)))

        async with trio.open_nursery() as requests:
            for number in range(4):
                requests.start_soon(read, number)
            await trio.sleep(2)
            replicas.begin_drain()

            assert replicas.state == "draining"
            with pytest.raises(EngineUnavailable, match="draining"):
                replicas.submit([1], [params()])
            await replicas.drained()
        assert counts == [10] * 4


async def test_a_replica_that_dies_leaves_the_others_serving(autojump_clock):
    first = FakeWorkers()
    replicas = make([[first, FakeWorkers(loading=30)], [FakeWorkers(), FakeWorkers(loading=10)]])
    results = {}

    async def request(number: int) -> None:
        results[number] = await generate(replicas, [number], 10)

    async with trio.open_nursery() as nursery:
        await nursery.start(replicas.run)
        async with trio.open_nursery() as requests:
            for number in range(4):
                requests.start_soon(request, number)
            await trio.sleep(3)
            first.end.set()
            await trio.sleep(1)

            assert [each.state for each in replicas._replicas] == ["recovering", "ready"]
            assert replicas.state == "ready"
            assert places(replicas) == [2, 2]
            for number in range(4, 6):  # one of them has nothing to do, and takes none
                requests.start_soon(request, number)
            await trio.sleep(20)

            assert places(replicas) == [2, 0]
        nursery.cancel_scope.cancel()

    assert results == {number: continuation([number], params(10)) for number in range(6)}


async def test_requests_wait_while_all_replicas_recover(autojump_clock):
    workers = [FakeWorkers(), FakeWorkers()]
    replicas = make([[each, FakeWorkers(loading=10 * n + 10)] for n, each in enumerate(workers)], max_queue=1, max_batch=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(replicas.run)
        for each in workers:
            each.end.set()
        await trio.sleep(1)

        assert replicas.state == "recovering"
        with ExitStack() as stack:
            waiting = [stack.enter_context(replicas.submit([number], [params()])) for number in range(3)]
            with pytest.raises(QueueFull):
                replicas.submit([3], [params()])
            for number, generation in enumerate(waiting):
                assert await finish(generation) == continuation([number], params())
        nursery.cancel_scope.cancel()


def test_progress_is_that_of_the_slowest():
    said = []
    progress = SlowestProgress(2, said.append)
    first, second = progress.of(0), progress.of(1)
    first(Progress("weights", 60, 100, "B"))
    second(Progress("weights", 10, 100, "B"))
    first(Progress("weights", 100, 100, "B"))
    first(Progress("graphs", 5, 5))
    second(Progress("weights", 100, 100, "B"))

    assert [(each.stage, each.done) for each in said] == [
        ("weights", 0),
        ("weights", 10),
        ("weights", 10),
        ("graphs", 0),
        ("weights", 100),
    ]


@pytest.mark.parametrize(
    ("replica", "rank", "place"), [(0, 0, (0, 2)), (0, 1, (1, 2)), (1, 0, (0, 2)), (1, 1, (1, 2))], ids=str
)
def test_ranks_are_dealt_over_the_machines(replica, rank, place, monkeypatch):
    monkeypatch.setattr(ServerConfig, "__post_init__", lambda self: None)
    config = ServerConfig(model="m", data_parallel=2, tensor_parallel=1, pipeline_parallel=2, nnodes=2)
    told = worker_config(config, FILES, rank, replica=replica)

    assert (told.local_rank, told.local_size) == place
    assert (told.rank, told.world_size, told.pipeline_parallel) == (rank, 2, 2)


def test_ranks_are_told_what_was_asked_for():
    asked = {
        "device": "cpu",
        "data_type": "float16",
        "load_format": "dummy",
        "max_batch": 3,
        "max_length": 64,
        "max_step_tokens": 48,
        "block_size": 8,
        "kv_cache_memory": 1 << 20,
        "media_cache_memory": 1 << 19,
        "log_level": "debug",
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "deterministic": True,
        "quant_type": "a16w4",
        "quant_group_size": 64,
        "quantize_head": True,
        "kv_cache_dtype": "int8",
        "vision_engine": "native",
        "pipeline_parallel": 2,
    }
    shared = {field.name for field in fields(ServerConfig)} & set(WorkerConfig.__struct_fields__)
    plain = ServerConfig(model="m")

    told = worker_config(ServerConfig(model="m", **asked), FILES, 0)

    assert set(asked) == shared
    assert {name: getattr(told, name) for name in asked} == asked
    assert all(getattr(plain, name) != value for name, value in asked.items())
