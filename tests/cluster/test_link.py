"""Who may speak over a link, and what is noticed of others' doings with it."""

import socket
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing

from dashinfer.cluster import hub as hub_module
from dashinfer.cluster import link as link_module
from dashinfer.cluster.link import MAX_BODY, MAX_MESSAGE, Link, answer_call, call, make_key
from dashinfer.cluster.messages import Line, Welcome
from dashinfer.errors import ConfigurationError, DashInferError, LinkLost

from .machines import KEY, background, make_agent, make_hub

pytestmark = pytest.mark.feature("Parallelism and recovery", "Several machines")


def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    one, other = (trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in socket.socketpair())
    return one, other


class Eavesdropper:
    """Between two streams: passes bytes on, keeps them, and may change what goes to the hub or the agent."""

    def __init__(self) -> None:
        self.agent, self._near_agent = stream_pair()
        self.hub, self._near_hub = stream_pair()
        self.to_hub, self.to_agent = bytearray(), bytearray()
        self.change = bytes

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, self._near_agent, self._near_hub, self.to_hub)
            nursery.start_soon(self._pass, self._near_hub, self._near_agent, self.to_agent)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, record: bytearray) -> None:
        with suppress(trio.BrokenResourceError):
            async for data in source:
                record += data
                await sink.send_all(self.change(data))

    async def __aenter__(self) -> "Eavesdropper":
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in (self.agent, self._near_agent, self.hub, self._near_hub):
            await trio.aclose_forcefully(stream)


async def handshake(agent: trio.SocketStream, hub: trio.SocketStream, agent_key: bytes = KEY, hub_key: bytes = KEY) -> list:
    """What each side of it comes to: a link, with the node rank on the hub's side, or its error."""
    outcomes: list = [None, None]

    async def keep(index: int, function, *arguments) -> None:
        try:
            outcomes[index] = await function(*arguments)
        except DashInferError as error:
            outcomes[index] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep, 0, call, agent, agent_key, 7)
        nursery.start_soon(keep, 1, answer_call, hub, hub_key)
    return outcomes


@asynccontextmanager
async def linked():
    """An agent's link, the hub's, and who listens in."""
    with trio.fail_after(10):
        between = Eavesdropper()
        async with between, background(between.run):
            agent, (node, hub) = await handshake(between.agent, between.hub)
            assert node == 7
            yield agent, hub, between


async def test_messages_and_frames_pass_both_ways():
    large = bytes(range(256)) * 10_000  # its MAC is made by a thread
    async with linked() as (agent, hub, _):
        hub.limit = MAX_BODY
        async with trio.open_nursery() as nursery:
            for each in (agent, hub):
                nursery.start_soon(each.ping)
            await hub.send(Welcome())
            nursery.start_soon(agent.send_frame, large)
            received = [await agent.receive(1), await hub.receive(1)]
            await agent.send(Line("hello"))
            received.append(await hub.receive(1))
            nursery.cancel_scope.cancel()

    assert received == [Welcome(), large, Line("hello")]


@pytest.mark.parametrize("keys", [(KEY, make_key("other")), (make_key(None), KEY), (KEY, make_key(""))])
async def test_another_secret_or_none_is_refused(keys):
    agent, hub = stream_pair()
    async with agent, hub:
        outcomes = await handshake(agent, hub, *keys)

    assert isinstance(outcomes[0], ConfigurationError) and str(outcomes[0]) == "machine 0 has another --cluster-secret"
    assert isinstance(outcomes[1], LinkLost) and str(outcomes[1]) == "it has another --cluster-secret"


async def test_without_a_secret_on_both_sides_there_is_a_link():
    agent, hub = stream_pair()
    async with agent, hub:
        outcomes = await handshake(agent, hub, make_key(None), make_key(None))

    assert isinstance(outcomes[0], Link) and isinstance(outcomes[1][1], Link)


async def test_what_an_agent_said_once_proves_nothing_later():
    async with linked() as (agent, hub, between):
        await agent.send(Line("hello"))
        await hub.receive()
        said = bytes(between.to_hub)
    stranger, hub = stream_pair()
    async with stranger, hub:
        await stranger.send_all(said)
        with pytest.raises(LinkLost, match="it has another --cluster-secret"):
            await answer_call(hub, KEY)


@pytest.mark.parametrize("source", ["recorded", "own"])
async def test_a_hub_without_the_secret_is_found_out(source):
    """It may say what a true hub said to another agent, or what this agent says itself."""
    async with linked() as (_, _, between):
        pass
    greeting, verdict = between.to_agent[:42], between.to_agent[42:]
    agent, impostor = stream_pair()
    async with agent, impostor, trio.open_nursery() as nursery:

        async def pretend() -> None:
            await impostor.send_all(greeting)
            answer = b""
            while len(answer) < 46 + 32:
                answer += await impostor.receive_some()
            await impostor.send_all(verdict if source == "recorded" else verdict[:1] + answer[46:])

        nursery.start_soon(pretend)
        with pytest.raises(ConfigurationError, match="machine 0 cannot prove that it knows the --cluster-secret"):
            await call(agent, KEY, 7)


@pytest.mark.parametrize("place", range(0, 78, 6))
async def test_any_change_of_the_handshake_is_noticed(place):
    with trio.fail_after(10):
        between = Eavesdropper()

        def change(data: bytes) -> bytes:
            if len(data) < 78:
                return bytes(data)
            return bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :])

        between.change = change
        async with between, background(between.run):
            outcomes: list = []

            async def answer() -> None:
                with pytest.raises(LinkLost) as caught:
                    await answer_call(between.hub, KEY)
                outcomes.append(caught.value)
                await between.hub.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                with trio.move_on_after(0.2), pytest.raises(DashInferError):
                    await call(between.agent, KEY, 7)

    assert len(outcomes) == 1


@pytest.mark.parametrize(
    ("doing", "passed"),
    [
        (lambda frames: [frames[1]], 0),  # the first is left out
        (lambda frames: [frames[0], frames[0]], 1),  # repeated
        (lambda frames: [frames[1], frames[0]], 0),  # another order
        (lambda frames: [frames[0][:-1] + b"\0", frames[1]], 0),
        (lambda frames: [frames[0][:6] + b"\xff" + frames[0][7:], frames[1]], 0),
        (lambda frames: [b"\x01" + frames[0][1:], frames[1]], 0),  # another length
    ],
)
async def test_frames_that_someone_touched_end_the_link(doing, passed):
    with trio.fail_after(10):
        near, far = stream_pair()
        sender = Link(near, "agent", b"k" * 32, b"r" * 32)
        frames = []
        for text in ("one", "two"):
            await sender.send(Line(text))
            frames.append(bytes(await far.receive_some()))
        await near.aclose()
        await far.aclose()

        stranger, stream = stream_pair()
        receiver = Link(stream, "hub", b"r" * 32, b"k" * 32)
        await stranger.send_all(b"".join(doing(frames)))
        await stranger.aclose()
        for text in ("one", "two")[:passed]:
            assert await receiver.receive() == Line(text)
        with pytest.raises(LinkLost):
            await receiver.receive()
        await stream.aclose()


async def test_what_the_hub_said_itself_is_not_taken_for_an_agents():
    async with linked() as (agent, hub, between):
        before = len(between.to_agent)
        await hub.send_frame(b"a plan")
        await agent.receive()
        await between._near_hub.send_all(bytes(between.to_agent[before:]))
        with pytest.raises(LinkLost, match="a frame is not authentic"):
            await hub.receive()


async def test_a_long_frame_is_refused_before_it_comes():
    async with linked() as (agent, hub, _), trio.open_nursery() as nursery:
        nursery.start_soon(agent.send_frame, bytes(MAX_MESSAGE))
        with pytest.raises(LinkLost, match=f"a frame of {MAX_MESSAGE + 1} bytes is over the limit of {MAX_MESSAGE}"):
            await hub.receive()
        nursery.cancel_scope.cancel()


async def test_what_does_not_decode_ends_the_link():
    async with linked() as (agent, hub, _):
        await agent.send(Welcome())  # which only a hub says
        with pytest.raises(LinkLost, match="a message does not decode"):
            await hub.receive()


async def test_silence_and_the_end():
    async with linked() as (agent, hub, _):
        with pytest.raises(LinkLost, match=r"no sign of life for 0\.05 s"):
            await hub.receive(0.05)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.ping)
            await trio.testing.wait_all_tasks_blocked()
            agent.end()
            with pytest.raises(LinkLost, match="the connection is closed"):
                await agent.send_frame(b"")
            nursery.cancel_scope.cancel()


async def test_time_in_which_this_process_was_stopped_is_no_silence(mock_clock):
    one, other = stream_pair()
    async with one, other, trio.open_nursery() as nursery:
        sender, receiver = Link(other, "agent", KEY, KEY), Link(one, "hub", KEY, KEY)
        received = []

        async def receive() -> None:
            received.append(await receiver.receive(3))
            with pytest.raises(LinkLost, match="no sign of life for 3 s"):
                await receiver.receive(3)

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3 + 100)
        await trio.testing.wait_all_tasks_blocked()
        await sender.send(Line("hello"))
        await trio.testing.wait_all_tasks_blocked()
        assert received == [Line("hello")]
        mock_clock.jump(3.5)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", b""])
async def test_something_else_that_answers_is_no_hub(greeting):
    agent, other = stream_pair()
    async with agent, other:
        await other.send_all(greeting)
        await other.send_eof()
        with pytest.raises(LinkLost):
            await call(agent, KEY, 1)


async def test_another_version_is_named(monkeypatch):
    monkeypatch.setattr(link_module, "PROTOCOL", 2)
    agent, hub = stream_pair()
    async with agent, hub, trio.open_nursery() as nursery:
        nursery.start_soon(agent.send_all, bytes(100))
        with pytest.raises(LinkLost, match="not an agent"):
            await answer_call(hub, KEY)
        greeting = await agent.receive_some()
        monkeypatch.setattr(link_module, "PROTOCOL", 1)
        await hub.send_all(greeting)
        with pytest.raises(ConfigurationError, match=r"another version of dashinfer \(protocol 2, here 1\)"):
            await call(agent, KEY, 1)


async def test_strangers_who_say_nothing_are_few_and_soon_gone(monkeypatch, caplog):
    monkeypatch.setattr(hub_module, "HANDSHAKE_TIMEOUT", 0.5)
    monkeypatch.setattr(hub_module, "MAX_STRANGERS", 3)
    with trio.fail_after(10), make_hub() as (hub, port):
        async with background(hub.run):
            strangers = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(4)]
            begun = trio.current_time()
            said = [b"", b"", b"", b""]
            for number, stranger in reversed(list(enumerate(strangers))):
                while data := await stranger.receive_some():
                    said[number] += data
                if number == 3:
                    assert trio.current_time() - begun < 0.4
            assert 0.4 < trio.current_time() - begun < 2
            agent = make_agent(port)
            async with background(agent.run):
                while not agent.joined:
                    await trio.sleep(0.01)
            for stranger in strangers:
                await stranger.aclose()

    assert sorted(map(len, said)) == [0, 42, 42, 42]
    assert "127.0.0.1 is refused: it says too little, too slowly" in caplog.messages
