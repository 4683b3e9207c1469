"""Redirects, and the domains that media may come from."""

import re

import pytest

from dashinfer.vision import fetch as fetching
from dashinfer.vision.fetch import fetch
from dashinfer.vision.policy import MediaPolicy
from tests.vision.fake_internet import SERVER_ADDRESS, FakeInternet, redirects_to, says
from tests.vision.fetching import NOT_PUBLIC, OK, PICTURE, POLICY, refusal

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")


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
