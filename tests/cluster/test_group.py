"""Groups of ranks over a hub and agents, whose ranks are real processes with a fake model."""

import os
import signal
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from dashinfer.errors import ConfigurationError, LinkLost, UnsupportedModel, WorkerError
from dashinfer.types import ModelFiles
from tests.process_tree import is_alive
from tests.worker.ranks import all_children, plans

from .machines import KEY, Group, Wire, background, configs, make_agent, make_hub, make_rank

pytestmark = pytest.mark.feature("Parallelism and recovery", "Several machines")


async def send_plans(group: Group, count: int) -> None:
    for plan, _ in zip(plans(), range(count), strict=False):
        await group.workers.send(plan)


async def results(group: Group, count: int) -> list[int]:
    """The first steps that gave results."""
    while len(group.results) < count:
        await trio.sleep(0.01)
    return [result.step for result in group.results]


async def until(condition) -> None:
    while not condition():
        await trio.sleep(0.01)


def rank_processes() -> list[int]:
    """Those of this process's children that are ranks."""
    return [pid for pid in all_children() if b"fake_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@asynccontextmanager
async def two_machines(mode: str, **changes):
    """A hub, an agent whose ranks behave like `mode`, and the wire between them."""
    with trio.fail_after(30), make_hub(**changes) as (hub, port):
        wire = Wire(port)
        async with background(hub.run) as nursery:
            await nursery.start(wire.run)
            nursery.start_soon(make_agent(wire.port, make_rank=make_rank(mode), **changes).run)
            yield hub, wire, nursery


@pytest.mark.parametrize("world_size", [1, 2])
async def test_a_group_with_ranks_on_the_other_machine(world_size):
    async with two_machines("good") as (hub, _, nursery):
        group = Group(hub, configs(world_size), replica=world_size == 1)
        ready = await nursery.start(group.run)
        await send_plans(group, 3)
        steps = await results(group, 3)
        assert len(rank_processes()) == world_size

    assert ready.architecture == "FakeForCausalLM"
    assert steps == [0, 1, 2]
    assert rank_processes() == []


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("die", WorkerError, "machine 1: rank 1 ended with exit status 3; its last words: the fake rank's last words"),
        ("killed", WorkerError, "machine 1: rank 1 was killed by SIGKILL"),
        ("refuse", UnsupportedModel, "machine 1: this model is not supported"),
        ("crash", WorkerError, "machine 1: rank 1: RuntimeError: something broke"),
    ],
)
async def test_the_end_of_a_rank_on_the_other_machine_is_told_and_another_can_start(mode, error, message, caplog):
    caplog.set_level("INFO")
    async with two_machines(mode) as (hub, _, _nursery):
        for _ in range(2):
            with pytest.raises(error, match=message):
                async with background() as inner:
                    group = Group(hub, configs(2))
                    await inner.start(group.run)
                    await send_plans(group, 3)
                    await trio.sleep_forever()
            assert rank_processes() == []
            if mode == "refuse":
                break  # that ends a server

    assert mode != "die" or "rank 1 on machine 1: the fake rank's last words" in caplog.messages


async def test_a_group_waits_for_a_machine_that_is_away(caplog):
    caplog.set_level("INFO")
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background(hub.run) as nursery:
            group = Group(hub, configs(2))
            nursery.start_soon(group.run)
            await until(lambda: "waiting for machine 1" in caplog.messages)
            assert rank_processes() == []
            nursery.start_soon(make_agent(port).run)
            await until(lambda: len(rank_processes()) == 2)


async def test_an_agent_waits_for_machine_0(caplog):
    caplog.set_level("INFO")
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background(make_agent(port).run) as nursery:
            await until(lambda: any("waiting for machine 0" in text for text in caplog.messages))
            await nursery.start(hub.run)
            await nursery.start(Group(hub, configs(2)).run)

    assert sum("waiting for machine 0" in text for text in caplog.messages) == 1


async def test_a_cut_wire_is_noticed_on_both_sides_and_mended():
    async with two_machines("good", heartbeat_timeout=3.0) as (hub, wire, nursery):
        with pytest.raises(LinkLost, match="rank 1 on machine 1 is lost: no sign of life for 3 s"):
            async with background() as inner:
                await inner.start(Group(hub, configs(2)).run)
                wire.cut()
                begun = trio.current_time()
                await trio.sleep_forever()
        assert 1.9 < trio.current_time() - begun < 3 + 2  # the last sign of life may be a second old
        await until(lambda: rank_processes() == [])
        assert trio.current_time() - begun < 3 + 3

        wire.mend()
        group = Group(hub, configs(2))
        await nursery.start(group.run)
        await send_plans(group, 3)
        assert await results(group, 3) == [0, 1, 2]


@pytest.mark.parametrize("stopped", [False, True])
async def test_the_hubs_end_ends_ranks_of_others_at_once(stopped):
    """Even one that is stopped, and reads nothing."""
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background(make_agent(port).run) as nursery:
            async with background(hub.run) as inner:
                await inner.start(Group(hub, configs(1), replica=1).run)
                [pid] = rank_processes()
                if stopped:
                    os.kill(pid, signal.SIGSTOP)
                begun = trio.current_time()
            await until(lambda: not is_alive(pid))
            nursery.cancel_scope.cancel()

    assert trio.current_time() - begun < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": b"another"}, "machine 0 has another --cluster-secret"),
        ({"nnodes": 3}, "machine 0 has settings for 2 machines of 1 ranks, not 3 machines of 1 ranks"),
        ({"node_rank": 2}, "--node-rank 2 is none of 1 to 1"),
        ({"node_rank": 0}, "--node-rank 0 is none of 1 to 1"),
        ({"files": ModelFiles("fake", "safetensors", (), {"layers": 3})}, "machine 0 serves fake, another config.json of fake"),
        ({"files": ModelFiles("x", "gguf", (), {"layers": 2}), "model": "x"}, "machine 0 serves fake, not x"),
    ],
)
async def test_an_agent_that_does_not_fit_ends_with_one_line(changes, message):
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background(hub.run):
            with pytest.raises(ConfigurationError, match=message):
                await make_agent(port, **changes).run()


async def test_an_agent_that_was_taken_once_goes_on_asking(caplog):
    """Machine 0 may come back with other settings, and then with the old ones."""
    caplog.set_level("INFO")
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background() as nursery:
            async with background(hub.run):
                agent = make_agent(port)
                nursery.start_soon(agent.run)
                await until(lambda: agent.joined)
            with make_hub(port=port, key=b"another") as (changed, _):
                async with background(changed.run):
                    await until(lambda: any("has another --cluster-secret" in text for text in caplog.messages))
            with make_hub(port=port, key=KEY) as (back, _):
                async with background(back.run), background() as inner:
                    await inner.start(Group(back, configs(2)).run)


async def test_a_second_machine_of_the_same_number_waits_until_the_first_is_gone(caplog):
    caplog.set_level("INFO")
    with trio.fail_after(30), make_hub() as (hub, port):
        async with background(hub.run) as nursery:
            async with background() as first:
                agent = make_agent(port)
                first.start_soon(agent.run)
                await until(lambda: agent.joined)
                second = make_agent(port)
                nursery.start_soon(second.run)
                await until(lambda: any("there is a machine with --node-rank 1 already" in text for text in caplog.messages))
            await until(lambda: second.joined)


def test_ranks_are_dealt_over_machines_in_order():
    with make_hub(nnodes=3, ranks=4) as (hub, _):
        nodes = [hub.workers(configs(2, local_size=4), replica=replica)._nodes for replica in range(6)]

    assert nodes == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]


async def test_where_ranks_meet():
    """On the machine of the group's first rank; nowhere, where there is one rank."""
    met = {}

    def make_rank_of(replica: int, config, **_):
        met[replica, config.rank] = config.rendezvous, config.interface
        return make_rank("good")(config, **_)

    with trio.fail_after(30), make_hub(ranks=3, make_rank=partial(make_rank_of, 0)) as (hub, port):
        async with background(hub.run, make_agent(port, ranks=3, make_rank=partial(make_rank_of, 1)).run) as nursery:
            await nursery.start(Group(hub, configs(4, local_size=3)).run)
            await nursery.start(Group(hub, configs(2, local_size=3), replica=2).run)

    first = met[0, 0][0]
    assert first.startswith("tcp://127.0.0.1:")
    assert met[1, 3] == met[0, 0]
    assert {url for (machine, _), (url, _) in met.items() if machine == 1} > {first}
    assert {interface for _, interface in met.values()} == {"lo"}
