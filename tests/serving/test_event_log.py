"""Events that are read while they come and afterwards."""

import pytest
import trio
import trio.testing

from dashinfer.serving.event_log import EventLog

MANY = 1000


def event(number: int) -> bytes:
    return b"event: a\ndata: %d\n\n" % number


async def read(log: EventLog, after: int) -> bytes:
    return b"".join([piece async for piece in log.follow(after)])


@pytest.mark.parametrize("together", [1, 3, 700])
async def test_what_has_ended_is_read_from_any_event_on(together: int) -> None:
    log = EventLog()
    for start in range(0, MANY, together):
        log.append(b"".join(event(number) for number in range(start, min(start + together, MANY))))
    log.end()

    for after in (-1, 0, 254, 255, 256, 698, 699, MANY - 2, MANY - 1, MANY, 10**6):
        assert await read(log, after) == b"".join(event(number) for number in range(after + 1, MANY))


async def test_what_comes_while_a_piece_is_sent_is_not_missed() -> None:
    log, heard = EventLog(), b""
    log.append(event(0))
    async for piece in log.follow(-1):
        heard += piece
        if log.count < MANY:
            log.append(event(log.count))
        else:
            log.end()

    assert heard == b"".join(map(event, range(MANY)))


async def test_who_follows_is_told(autojump_clock: trio.testing.MockClock) -> None:
    log, heard = EventLog(), []

    async def follow() -> None:
        async for piece in log.follow(0):
            heard.append((trio.current_time() - began, piece))

    began = trio.current_time()
    log.append(event(0) + event(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await trio.sleep(1)
        log.append(event(2))
        log.append(event(3))
        await trio.sleep(1)
        log.end()

    assert heard == [(0, event(1)), (1, event(2) + event(3))]


def test_it_takes_a_part_of_what_it_tells() -> None:
    log, told = EventLog(), 0
    for number in range(MANY):
        delta = (
            b'data: {"type":"response.output_text.delta","sequence_number":%d,"item_id":"msg_0123456789abcdef01234567",'
            % number
        )
        delta += b'"output_index":0,"content_index":0,"delta":" word%d","logprobs":[]}\n\n' % (number * 7919 % 1000)
        log.append(b"event: response.output_text.delta\n" + delta)
        told += len(delta)
    log.end()

    assert log.size < told / 8
