"""Which addresses media are fetched from, and how they are tried."""

from ipaddress import ip_address

import pytest
import trio
from trio.testing import MockClock

from dashinfer.vision.addresses import is_public
from dashinfer.vision.fetch import fetch
from dashinfer.vision.network import ATTEMPT_DELAY
from dashinfer.vision.policy import MediaPolicy
from tests.vision.fake_internet import SERVER_ADDRESS, FakeInternet, redirects_to, says
from tests.vision.fetching import NOT_PUBLIC, OK, PICTURE, POLICY, refusal

pytestmark = pytest.mark.feature("Security", "Media from public addresses alone")


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
