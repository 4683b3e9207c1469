"""This machine's interfaces, and the port for others."""

import socket
from ipaddress import ip_address

import pytest

from dashinfer.cluster import network
from dashinfer.errors import AddressInUse, ConfigurationError


def test_interfaces_and_their_addresses():
    found = network.interfaces()

    assert ("lo", ip_address("127.0.0.1")) in found
    assert {name for name, _ in found} <= {name for _, name in socket.if_nameindex()}
    for name, address in found:
        assert network.interface_of(str(address)) == name
        assert network.address_of(name, str(address)) == str(address)


def test_an_address_of_an_interface_is_one_of_the_same_family():
    assert network.address_of("lo", "203.0.113.1") == "127.0.0.1"


def test_what_is_not_there_is_said():
    with pytest.raises(ConfigurationError, match=r"--cluster-interface nothing: no such interface; there are .*lo"):
        network.address_of("nothing", "127.0.0.1")
    with pytest.raises(ConfigurationError, match=r"no network interface with the address 203\.0\.113\.1"):
        network.interface_of("203.0.113.1")
    with pytest.raises(ConfigurationError, match=r"--master-addr nowhere\.\.invalid: no such address"):
        network.resolve("nowhere..invalid")
    with (
        pytest.raises(ConfigurationError, match=r"--master-addr 203\.0\.113\.1 is not an address of this machine"),
        network.bind("203.0.113.1", 0, None),
    ):
        pass


def test_a_port_in_use_is_said():
    with (
        network.bind("127.0.0.1", 0, None) as sock,
        pytest.raises(AddressInUse, match="in use; choose another with --master-port, the same on all machines"),
    ):
        sock.listen()
        with network.bind("127.0.0.1", sock.getsockname()[1], "lo"):
            pass


def test_a_held_port_is_kept_from_others():
    sock, port = network.hold_port("127.0.0.1")
    with sock, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
