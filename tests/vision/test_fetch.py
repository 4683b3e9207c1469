"""Fetching media from an internet that means harm: the right error, in bounded time, and no connection left open."""

import gzip
import re
import ssl

import pytest
import trio
from trio.testing import MockClock

from dashinfer.errors import MediaError
from dashinfer.vision.fetch import fetch
from dashinfer.vision.network import Internet
from dashinfer.vision.policy import MediaPolicy
from tests.vision.fake_internet import (
    SERVER_ADDRESS,
    FakeInternet,
    Server,
    read_head,
    redirection,
    redirects_to,
    says,
    says_forever,
)
from tests.vision.fetching import NOT_PUBLIC, OK, PICTURE, POLICY, listen, refusal

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")


# --- what works


async def test_a_picture(internet: FakeInternet) -> None:
    heads = []

    async def serve(stream: trio.abc.Stream) -> None:
        heads.append(await read_head(stream))
        await stream.send_all(OK + PICTURE)

    internet.add("example.com", serve, port=8080)

    assert await fetch(" http://Example.COM.:8080/a b/\u00e9.png?q=[1]%20#top\n", POLICY, network=internet) == PICTURE
    assert internet.record == ["example.com", f"{SERVER_ADDRESS}:8080"]
    first, *headers = heads[0].decode().strip().split("\r\n")
    assert first == "GET /a%20b/%C3%A9.png?q=[1]%20 HTTP/1.1"
    assert sorted(headers) == [
        "Accept-Encoding: identity",
        "Accept: */*",
        "Connection: close",
        "Host: example.com:8080",
        "User-Agent: dashinfer",
    ]


@pytest.mark.parametrize(
    "server",
    [
        says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n", OK, PICTURE[:100], PICTURE[100:]),
        says(b"HTTP/1.0 200 OK\r\n\r\n", PICTURE),
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800;x=y\r\n", PICTURE, b"\r\n0\r\nTrailer: z\r\n\r\n"),
        says(b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Type: text/html\r\n\r\n", PICTURE),
        says(OK + PICTURE + b"more than was announced"),
        says_forever(OK, PICTURE),
    ],
    ids=["interim", "until the end", "chunked", "identity", "more", "forever"],
)
async def test_forms_of_an_answer(internet: FakeInternet, server: Server) -> None:
    internet.add("example.com", server)

    assert await fetch("http://example.com", POLICY, network=internet) == PICTURE


async def test_redirects_are_followed(internet: FakeInternet) -> None:
    answers = {
        b"/a/b": redirection("c?d", 301),
        b"/a/c?d": redirection("//cdn.example.com/e", 307),
        b"/e": redirection("http://example.com:80/f#g", 308),
        b"/f": OK + PICTURE,
    }

    async def serve(stream: trio.abc.Stream) -> None:
        await stream.send_all(answers[(await read_head(stream)).split()[1]])

    internet.add("example.com", serve)
    internet.add("cdn.example.com", serve)

    assert await fetch("http://example.com/a/b", POLICY, network=internet) == PICTURE
    names = [line for line in internet.record if ":" not in line]
    assert names == ["example.com", "example.com", "cdn.example.com", "example.com"]  # each hop is resolved and checked anew


# --- servers that do not give what was asked


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (says_forever(b"", b"", pause=1), "took longer than 5 seconds"),
        (says_forever(b"HTTP/1.1 200 OK\r\n", b"X-Slow: 1\r\n", pause=1), "took longer than 5 seconds"),
        (says_forever(OK, b"x", pause=1), "took longer than 5 seconds"),
        (says_forever(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000), "larger than 4096 bytes"),
        (says_forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 99), "larger than 4096 bytes"),
        (
            says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 9000 + b"\r\nx\r\n") * 5),
            "larger than 4096 bytes",
        ),
        (says(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(4097)), "larger than 4096 bytes"),
        (says_forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1" * 100), "malformed or ended early"),
        (
            says_forever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"Trailer: x\r\n" * 99),
            "larger than 4096 bytes|malformed or ended early",
        ),
        (says_forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "malformed or ended early"),
        (says_forever(b"HTTP/1.1 200 OK\r\n", b"X-Header: value\r\n" * 99), "malformed or ended early"),
        (says_forever(b"HTTP/1.1 200 ", b"x" * 999), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 4097\r\n\r\n"), "larger than 4096 bytes"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\n"), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"), "malformed or ended early"),
        (says(OK, PICTURE[:-1]), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n", PICTURE), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nX: y"), "malformed or ended early"),
        (says(), "malformed or ended early"),
        (says(b"220 mail.example.com ESMTP\r\n"), "malformed or ended early"),
        (says(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), "malformed or ended early"),
        (says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), "is empty"),
        (says(b"HTTP/1.1 204 No Content\r\n\r\n"), "answered with status 204"),
        (says(b"HTTP/1.1 206 Partial\r\nContent-Length: 6\r\n\r\nsecret"), "answered with status 206"),
        (says(b"HTTP/1.1 404 secret\r\nContent-Length: 6\r\n\r\nsecret"), "answered with status 404"),
        (says(b"HTTP/1.1 304 Not Modified\r\n\r\n"), "answered with status 304"),
        (says(b"HTTP/1.1 302 Found\r\n\r\n"), "redirects it to nowhere"),
        (
            says(
                b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Encoding: identity\r\n\r\n", gzip.compress(bytes(10**6))
            ),
            "sent it compressed",
        ),
        (says(b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\nxx"), "sent it compressed"),
        (
            says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", gzip.compress(bytes(10**6))),
            "malformed or ended early",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_answer(internet: FakeInternet, autojump_clock: MockClock, server: Server, reason: str) -> None:
    internet.add("example.com", server)
    start = trio.current_time()

    said = await refusal("http://example.com/picture", POLICY, internet)

    assert re.search(reason, said)
    assert "secret" not in said
    assert trio.current_time() - start <= POLICY.timeout
    assert internet.record == ["example.com", f"{SERVER_ADDRESS}:80"]


async def test_no_answer_to_the_lookup(internet: FakeInternet, autojump_clock: MockClock) -> None:
    async def resolve(host: str, port: int) -> list:
        await trio.sleep_forever()
        raise AssertionError

    internet.resolve = resolve

    assert "took longer than 5 seconds" in await refusal("http://example.com", POLICY, internet)


async def test_the_deadline_is_for_all_redirects_together(internet: FakeInternet, autojump_clock: MockClock) -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        await trio.sleep(2)
        await redirects_to("/again")(stream)

    internet.add("example.com", serve)
    start = trio.current_time()

    assert "took longer than 5 seconds" in await refusal("http://example.com", POLICY, internet)
    assert trio.current_time() - start == pytest.approx(5)


async def test_a_reset_connection() -> None:
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            await read_head(stream)
            await stream.send_all(OK)
            stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close sends RST

        port = await listen(nursery, serve)

        assert "broke" in await refusal(f"http://127.0.0.1:{port}/", MediaPolicy(allow_private=True), Internet())
        nursery.cancel_scope.cancel()


# --- turns and room


async def test_a_tiny_chunk_at_a_time_leaves_others_their_turn(internet: FakeInternet) -> None:
    size = 10_000
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    internet.add("example.com", says(head + b"1\r\nx\r\n" * size + b"0\r\n\r\n"))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        assert await fetch("http://example.com/", MediaPolicy(max_bytes=size * 3), network=internet) == b"x" * size
        nursery.cancel_scope.cancel()
    assert turns >= size


async def test_room_is_made_before_memory_is_taken(internet: FakeInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer.vision.http._ROOM", 100)
    internet.add("example.com", says(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 90, b"x" * 90, b"x" * 90))
    asked = []

    async def make_room(size: int) -> None:
        asked.append(size)

    for source in ("http://example.com/", "data:,xxx"):
        await fetch(source, MediaPolicy(max_bytes=300), network=internet, make_room=make_room)
    assert (asked[0], asked[-1]) == (100, len("data:,xxx"))
    assert 270 <= asked[-2] <= 300
    assert asked[:-1] == sorted(asked[:-1])


async def test_waiting_for_room_does_not_count(internet: FakeInternet, autojump_clock: MockClock) -> None:
    internet.add("example.com", says(OK, PICTURE))

    async def make_room(size: int) -> None:
        await trio.sleep(100)

    assert await fetch("http://example.com/", POLICY, network=internet, make_room=make_room) == PICTURE
    internet.add("slow.example", says_forever(OK, b"x", pause=1))
    start = trio.current_time()
    with pytest.raises(MediaError, match="longer than 5 seconds"):
        await fetch("http://slow.example/", POLICY, network=internet, make_room=make_room)
    assert trio.current_time() - start == 105


# --- the true network


async def test_loopback_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxied: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        proxied.append(await read_head(stream))

    async with trio.open_nursery() as nursery:
        port, proxy_port = [await listen(nursery, handler) for handler in (says(OK, PICTURE), proxy)]
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy_port}")

        assert await fetch(f"http://127.0.0.1:{port}/", MediaPolicy(allow_private=True)) == PICTURE
        assert await fetch(f"http://localhost:{port}/", MediaPolicy(allow_private=True)) == PICTURE
        for host in ("127.0.0.1", "localhost"):
            assert NOT_PUBLIC in await refusal(f"http://{host}:{port}/", POLICY, Internet())
        nursery.cancel_scope.cancel()
    assert proxied == []


async def test_the_systems_tls_context_verifies() -> None:
    context = await Internet().tls_context()

    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
