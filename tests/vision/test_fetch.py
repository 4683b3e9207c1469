"""Fetching media from an internet that means harm: the right error, in bounded time, and no connection left open."""

import gzip
import re
import ssl
from collections.abc import AsyncIterator
from functools import partial
from ipaddress import ip_address

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from dashinfer.errors import InvalidRequest, MediaError
from dashinfer.vision import fetch as fetching
from dashinfer.vision.addresses import is_public
from dashinfer.vision.fetch import fetch
from dashinfer.vision.network import ATTEMPT_DELAY, Internet
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.url import HttpUrl, parse_url, resolve_location
from tests.vision.fake_internet import (
    SERVER_ADDRESS,
    FakeInternet,
    Server,
    encrypted,
    read_head,
    redirection,
    redirects_to,
    says,
    says_forever,
)

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")

PICTURE = bytes(range(256)) * 8
POLICY = MediaPolicy(timeout=5, max_bytes=4096)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE)
NOT_PUBLIC = "no address, or one that is not public"


@pytest.fixture
async def internet(nursery: trio.Nursery) -> AsyncIterator[FakeInternet]:
    internet = FakeInternet(nursery)
    yield internet
    assert internet.open_lines == set()


async def refusal(source: str, policy: MediaPolicy, internet: FakeInternet | Internet) -> str:
    """The reason for which a source is refused."""
    with pytest.raises(MediaError) as caught:
        await fetch(source, policy, index=3, network=internet)
    assert isinstance(caught.value, InvalidRequest) and caught.value.status == 400
    assert caught.value.index == 3
    assert caught.value.message == f"media[3]: {caught.value.reason}"
    return caught.value.reason


async def listen(nursery: trio.Nursery, server: Server) -> int:
    """The port of a true server on 127.0.0.1."""
    listeners = await nursery.start(partial(trio.serve_tcp, server, 0, host="127.0.0.1"))
    return listeners[0].socket.getsockname()[1]


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


# --- addresses

NOT_PUBLIC_ADDRESSES = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 127.255.0.1 169.254.169.254 172.16.0.1 172.31.255.255
168.63.129.16 192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 239.1.1.1
240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::ffff:0:8.8.8.8
64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8 100::1 2001::1 2001:0:7f00:1::
2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1:: 2002:808:808:: 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1
fe80::1%eth0 fec0::1 ff02::1 ff0e::1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC_ADDRESSES.split())
async def test_addresses_that_are_not_public(internet: FakeInternet, address: str) -> None:
    assert not is_public(ip_address(address))
    internet.names["example.com"] = [[address]]

    assert NOT_PUBLIC in await refusal("http://example.com/", POLICY, internet)
    assert internet.record == ["example.com"]


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::8.8.8.8"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::]:80/",
        "http://0.0.0.0/",
        "http://\uff11\uff12\uff17.0.0.1/",
        "http://127\u30020\u30020\u30021/",
        "HTTP://127.0.0.1./",
    ],
)
async def test_internal_addresses_in_the_url(internet: FakeInternet, url: str) -> None:
    assert NOT_PUBLIC in await refusal(url, POLICY, internet)
    assert internet.record == []


async def test_one_private_address_among_public_ones(internet: FakeInternet) -> None:
    internet.add("example.com", says(OK, PICTURE))
    internet.names["example.com"] = [[SERVER_ADDRESS, "10.0.0.1"]]

    assert NOT_PUBLIC in await refusal("http://example.com/", POLICY, internet)
    assert internet.record == ["example.com"]


async def test_a_private_address_beyond_those_that_are_tried(internet: FakeInternet) -> None:
    internet.names["example.com"] = [[*(f"8.8.8.{last}" for last in range(100)), "10.0.0.1"]]

    assert NOT_PUBLIC in await refusal("http://example.com/", POLICY, internet)


async def test_an_internal_name_is_told_from_no_absent_one(internet: FakeInternet) -> None:
    internet.names["db.internal"] = [["10.0.0.1"]]
    internet.names["empty.internal"] = [[]]

    reasons = {await refusal(f"http://{name}.internal/", POLICY, internet) for name in ("db", "empty", "absent")}

    assert len(reasons) == 1
    assert "10.0.0.1" not in reasons.pop()


async def test_an_answer_that_changes_is_asked_for_once(internet: FakeInternet) -> None:
    internet.add("example.com", says(OK, PICTURE))
    internet.names["example.com"] = [[SERVER_ADDRESS], ["127.0.0.1"]]
    internet.servers["127.0.0.1", 80] = says(b"HTTP/1.0 200 OK\r\n\r\nsecret")

    assert await fetch("http://example.com/", POLICY, network=internet) == PICTURE
    assert internet.record == ["example.com", f"{SERVER_ADDRESS}:80"]


async def test_an_answer_that_changes_between_redirects(internet: FakeInternet) -> None:
    internet.add("example.com", redirects_to("/again"))
    internet.names["example.com"] = [[SERVER_ADDRESS], ["127.0.0.1"]]

    assert NOT_PUBLIC in await refusal("http://example.com/", POLICY, internet)
    assert internet.record == ["example.com", f"{SERVER_ADDRESS}:80", "example.com"]


async def test_private_addresses_where_they_are_allowed(internet: FakeInternet) -> None:
    policy = MediaPolicy(allow_private=True)
    internet.add("db.internal", says(OK, PICTURE), address="10.0.0.1")
    internet.servers["::1", 81] = says(OK, PICTURE)

    assert await fetch("http://db.internal/", policy, network=internet) == PICTURE
    assert await fetch("http://[::1]:81/", policy, network=internet) == PICTURE
    assert "its host has no address" in await refusal("http://absent.internal/", policy, internet)


async def test_the_next_address_is_tried(internet: FakeInternet, autojump_clock: MockClock) -> None:
    silent, refusing = "2606:4700::1", "2606:4700::2"
    internet.add("example.com", says(OK, PICTURE))
    internet.names["example.com"] = [[silent, refusing, SERVER_ADDRESS, SERVER_ADDRESS]]
    internet.servers[silent, 80] = None
    start = trio.current_time()

    assert await fetch("http://example.com/", POLICY, network=internet) == PICTURE
    assert internet.record == ["example.com", f"{silent}:80", f"{refusing}:80", f"{SERVER_ADDRESS}:80"]
    assert trio.current_time() - start == pytest.approx(ATTEMPT_DELAY)


async def test_two_connections_at_the_same_moment(internet: FakeInternet, autojump_clock: MockClock) -> None:
    """The one that comes second is closed; the fixture looks for what is left open."""
    slow, slower = "8.8.8.8", "8.8.4.4"
    internet.names["example.com"] = [[slow, slower]]
    internet.servers = {(slow, 80): says(OK, PICTURE), (slower, 80): says(OK, PICTURE)}
    connect = internet.connect

    async def connect_shielded(address, port: int) -> trio.abc.Stream:
        with trio.CancelScope(shield=True):
            await trio.sleep(1 if str(address) == slow else 1 - ATTEMPT_DELAY)
            return await connect(address, port)

    internet.connect = connect_shielded

    assert await fetch("http://example.com/", POLICY, network=internet) == PICTURE
    assert len(internet.record) == 3


async def test_a_connection_that_comes_while_cancelled(internet: FakeInternet, autojump_clock: MockClock) -> None:
    """It is closed too."""
    internet.add("example.com", says(OK, PICTURE))
    connect = internet.connect

    async def connect_shielded(address, port: int) -> trio.abc.Stream:
        with trio.CancelScope(shield=True):
            await trio.sleep(2 * POLICY.timeout)
            return await connect(address, port)

    internet.connect = connect_shielded

    assert "took longer than 5 seconds" in await refusal("http://example.com/", POLICY, internet)
    assert len(internet.record) == 2


async def test_no_address_answers(internet: FakeInternet, autojump_clock: MockClock) -> None:
    internet.names["example.com"] = [[f"8.8.8.{last}" for last in range(50)]]

    assert "cannot be reached" in await refusal("http://example.com/", POLICY, internet)
    assert len(internet.record) == 1 + 4


# --- URLs


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com/", "none of an http:, https:, data: and file: URL"),
        ("gopher://example.com/", "none of an http:"),
        ("picture.png", "none of an http:"),
        ("", "none of an http:"),
        ("http:example.com", "malformed"),
        ("http:///etc/passwd", "not a name"),
        ("http://", "not a name"),
        ("http://user:password@example.com/", "credentials"),
        ("http://user@example.com/", "credentials"),
        ("http://example.com\\@127.0.0.1/", "malformed"),
        ("http://example.com/a\r\nX: y", "malformed"),
        ("http://example.com\t/", "malformed"),
        ("http://exam ple.com/", "not a name"),
        ("http://127%2e0.0.1/", "not a name"),
        ("http://example..com/", "not a name"),
        ("http://" + "a" * 64 + ".com/", "not a name"),
        ("http://" + "a." * 200 + "com/", "not a name"),
        ("http://" + "\u00e9" * 5000 + "/", "not a name"),
        ("http://\u2603\u0000.com/", "malformed"),
        ("http://\u200b.com/", "not a name"),
        ("http://example.com:0/", "port"),
        ("http://example.com:65536/", "port"),
        ("http://example.com:80:80/", "malformed"),
        ("http://example.com:\u0661/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http://[::1]x/", "malformed"),
        ("http://[fe80::1%25eth0]/", "IPv6"),
        ("http://[v1.x]/", "IPv6"),
        ("http://2130706433/", "number as host"),
        ("http://0x7f000001/", "number as host"),
        ("http://017700000001/", "number as host"),
        ("http://0177.0.0.1/", "number as host"),
        ("http://0x7f.0.0.0x1/", "number as host"),
        ("http://127.1/", "number as host"),
        ("http://0/", "number as host"),
        ("http://\u2460.\u2461/", "number as host"),
        ("http://example.com/" + "a" * 9000, "longer than"),
        ("http://example.com/\ud800", "malformed"),
    ],
)
async def test_urls_that_are_refused(internet: FakeInternet, url: str, reason: str) -> None:
    assert reason in await refusal(url, POLICY, internet)
    assert internet.record == []


@pytest.mark.parametrize(
    ("url", "authority", "target"),
    [
        ("HTTPS://EXAMPLE.com:443?x", "example.com", "/?x"),
        ("http://example.com:443/#a?b", "example.com:443", "/"),
        ("http://b\u00fccher.Example/", "xn--bcher-kva.example", "/"),
        ("http://stra\u00dfe.example/", "xn--strae-oqa.example", "/"),
        ("http://xn--bcher-kva.example:/", "xn--bcher-kva.example", "/"),
        ("http://[2606:4700:0::1]:81/", "[2606:4700::1]:81", "/"),
        ("http://a_b.example/..;/%2e?a=http://c@d/", "a_b.example", "/..;/%2e?a=http://c@d/"),
    ],
)
def test_urls_that_are_read(url: str, authority: str, target: str) -> None:
    parsed = parse_url(url)

    assert (parsed.authority, parsed.target) == (authority, target)
    assert parse_url(str(parsed)) == parsed


ODD = "ab.:/@[]%?#\\ -_09\ud800\udc80\u00e9\u200d\u0130\u00df\u0660\u3002\u2460\x00\t=;,+"


@given(st.sampled_from(["http://", "http://[", "https://xn--", "http://a.org/", "/", "//", "?"]), st.text(ODD, max_size=12))
def test_any_text_is_a_url_or_a_media_error(start: str, rest: str) -> None:
    base = HttpUrl("http", "example.com", 80, "/")
    for read in (parse_url, partial(resolve_location, base)):
        try:
            url = read(start + rest)
        except MediaError:
            continue
        assert str(url).isascii() and " " not in str(url)
        assert parse_url(str(url)) == url


# --- redirects


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.1/", NOT_PUBLIC),
        ("http://[::1]/", NOT_PUBLIC),
        ("http://localhost/", NOT_PUBLIC),
        ("//169.254.169.254/latest/meta-data", NOT_PUBLIC),
        ("http://2130706433/", "number as host"),
        ("http://user:password@example.com/", "credentials"),
        ("file:///etc/passwd", "not an HTTP URL"),
        ("data:text/plain,secret", "not an HTTP URL"),
        ("gopher://example.com/", "not an HTTP URL"),
        ("http://[", "malformed URL"),
        ("http:\\\\127.0.0.1", "malformed URL"),
        ("/" * 9000, "malformed|longer"),
    ],
)
async def test_redirects_that_are_refused(internet: FakeInternet, location: str, reason: str) -> None:
    internet.add("example.com", redirects_to(location))
    internet.names["localhost"] = [["127.0.0.1", "::1"]]

    assert re.search(reason, await refusal("http://example.com/", POLICY, internet))
    assert [line for line in internet.record if line.endswith(":80")] == [f"{SERVER_ADDRESS}:80"]


@pytest.mark.parametrize("location", ["/", "?a", "http://example.com/b"])
async def test_redirects_without_end(internet: FakeInternet, location: str) -> None:
    internet.add("example.com", redirects_to(location))

    assert "redirected more than 3 times" in await refusal("http://example.com/", POLICY, internet)
    assert internet.record == ["example.com", f"{SERVER_ADDRESS}:80"] * (1 + fetching.MAX_REDIRECTS)


async def test_allowed_domains(internet: FakeInternet) -> None:
    policy = MediaPolicy(allowed_domains=("example.com", "8.8.8.8"))
    for name in ("example.com", "cdn.example.com", "badexample.com", "example.com.evil.org"):
        internet.add(name, says(OK, PICTURE))
    internet.add("out.example.com", redirects_to("http://example.com.evil.org/"), address="8.8.8.8")

    assert await fetch("http://EXAMPLE.com./", policy, network=internet) == PICTURE
    assert await fetch("http://cdn.example.com/", policy, network=internet) == PICTURE
    internet.record.clear()
    for host in ("badexample.com", "example.com.evil.org", "com", SERVER_ADDRESS):
        assert "not among those" in await refusal(f"http://{host}/", policy, internet)
    assert internet.record == []
    for host in ("out.example.com", "8.8.8.8"):
        assert "not among those" in await refusal(f"http://{host}/", policy, internet)
    assert "example.com.evil.org" not in internet.record


async def test_an_allowed_domain_may_be_private_only_where_that_is_allowed(internet: FakeInternet) -> None:
    internet.add("media.internal", says(OK, PICTURE), address="10.0.0.1")
    policy = MediaPolicy(allowed_domains=("internal",))

    assert NOT_PUBLIC in await refusal("http://media.internal/", policy, internet)
    policy = MediaPolicy(allowed_domains=("internal",), allow_private=True)
    assert await fetch("http://media.internal/", policy, network=internet) == PICTURE


# --- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def certified(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name, key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


async def test_tls(internet: FakeInternet, authority: trustme.CA) -> None:
    internet.authority = trusting(authority)
    asked = []
    context = certified(authority, "xn--bcher-kva.example")
    context.sni_callback = lambda connection, name, context: asked.append(name)
    internet.add("xn--bcher-kva.example", encrypted(says(OK, PICTURE), context), port=443)
    internet.servers["8.8.8.8", 443] = encrypted(says(OK, PICTURE), certified(authority, "8.8.8.8"))
    internet.add("up.example", redirects_to("https://b\u00fccher.example/"))

    assert await fetch("https://b\u00fccher.example/", POLICY, network=internet) == PICTURE
    assert await fetch("https://8.8.8.8/", POLICY, network=internet) == PICTURE
    assert await fetch("http://up.example/", POLICY, network=internet) == PICTURE
    assert asked == ["xn--bcher-kva.example"] * 2


async def test_certificates_that_are_refused(internet: FakeInternet, authority: trustme.CA) -> None:
    internet.authority = trusting(authority)
    stranger = trustme.CA(key_type=trustme.KeyType.ECDSA)
    requests = []

    async def serve(stream: trio.abc.Stream) -> None:
        requests.append(await read_head(stream))

    for name, context in {
        "wrong-name.example": certified(authority, "other.example"),
        "unknown.example": certified(stranger, "unknown.example"),
    }.items():
        internet.add(name, encrypted(serve, context), port=443)

        assert "certificate is not valid" in await refusal(f"https://{name}/", POLICY, internet)
    assert requests == []


async def test_no_tls_at_its_port(internet: FakeInternet, autojump_clock: MockClock, authority: trustme.CA) -> None:
    internet.authority = trusting(authority)

    async def hang_up(stream: trio.abc.Stream) -> None:
        await stream.receive_some()

    async def silent(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            pass

    for server in (hang_up, says_forever_at_once(b"HTTP/1.1 400 Bad Request\r\n\r\n")):
        internet.add("example.com", server, port=443)
        assert "no secure connection" in await refusal("https://example.com/", POLICY, internet)
    internet.add("example.com", silent, port=443)
    assert "took longer than 5 seconds" in await refusal("https://example.com/", POLICY, internet)


def says_forever_at_once(part: bytes) -> Server:
    async def serve(stream: trio.abc.Stream) -> None:
        while True:
            await stream.send_all(part)

    return serve


async def test_no_redirect_from_https_to_http(internet: FakeInternet, authority: trustme.CA) -> None:
    internet.authority = trusting(authority)
    internet.add("plain.example", says(OK, PICTURE))
    internet.add("example.com", encrypted(redirects_to("http://plain.example/"), certified(authority, "example.com")), port=443)

    assert "redirected from https to http" in await refusal("https://example.com/", POLICY, internet)
    assert "plain.example" not in internet.record


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
