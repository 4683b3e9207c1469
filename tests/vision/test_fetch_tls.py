"""Media over HTTPS."""

import ssl

import pytest
import trio
import trustme
from trio.testing import MockClock

from dashinfer.vision.fetch import fetch
from tests.vision.fake_internet import FakeInternet, Server, encrypted, read_head, redirects_to, says
from tests.vision.fetching import OK, PICTURE, POLICY, refusal

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")


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
