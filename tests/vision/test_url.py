"""URLs of media: what they are read as, and which are refused."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer.errors import MediaError
from dashinfer.vision.url import HttpUrl, parse_url, resolve_location
from tests.vision.fake_internet import FakeInternet
from tests.vision.fetching import POLICY, refusal

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")


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
