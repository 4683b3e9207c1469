"""This machine's interfaces and addresses, and the port that other machines dial. Linux tells them by netlink."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

from dashinfer.errors import AddressInUse, ConfigurationError

Address = IPv4Address | IPv6Address

BACKLOG = 128
# linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h
_NLMSG_DONE = 3
_RTM_GETADDR = 22
_RTM_NEWADDR = 20
_NLM_F_REQUEST_DUMP = 0x301
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ATTRIBUTE = struct.Struct("=HH")  # length, type


def interfaces() -> list[tuple[str, Address]]:
    """Every interface with each of its addresses; nothing where the system has no netlink."""
    if not hasattr(socket, "AF_NETLINK"):
        return []
    found = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        request = _IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        sock.sendall(_HEADER.pack(_HEADER.size + len(request), _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0) + request)
        done = False
        while not done:
            data = sock.recv(1 << 16)
            while len(data) >= _HEADER.size and not done:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _RTM_NEWADDR:
                    found.append(_parse_address(data[_HEADER.size : length]))
                else:
                    done = True  # _NLMSG_DONE, or an error
                data = data[_aligned(length) :]
    return found


def _parse_address(message: bytes) -> tuple[str, Address]:
    _, _, _, _, index = _IFADDR.unpack_from(message)
    values: dict[int, bytes] = {}
    position = _IFADDR.size
    while position + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, position)
        values[kind] = message[position + _ATTRIBUTE.size : position + length]
        position += max(_aligned(length), _ATTRIBUTE.size)
    return socket.if_indextoname(index), ip_address(values.get(_IFA_LOCAL) or values[_IFA_ADDRESS])


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def interface_of(host: str) -> str:
    """The interface that has this address.

    Raises:
        ConfigurationError: none has.
    """
    address = _numeric(host)
    if address.is_loopback:
        return "lo"
    for name, own in interfaces():
        if own == address:
            return name
    raise ConfigurationError(f"no network interface with the address {host} is found; name it with --cluster-interface")


def address_of(interface: str, near: str) -> str:
    """An address of an interface: `near` itself if it is one, else the first of the same family.

    Raises:
        ConfigurationError: no such interface, or one without such an address.
    """
    names = [name for _, name in socket.if_nameindex()]
    if interface not in names:
        raise ConfigurationError(f"--cluster-interface {interface}: no such interface; there are {', '.join(names)}")
    wanted = _numeric(resolve(near))
    own = [address for name, address in interfaces() if name == interface and address.version == wanted.version]
    if not own:
        raise ConfigurationError(f"--cluster-interface {interface} has no IPv{wanted.version} address, as --master-addr is one")
    return str(wanted if wanted in own else own[0])


def resolve(host: str) -> str:
    """The numeric address of --master-addr.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except (socket.gaierror, UnicodeError):
        raise ConfigurationError(f"--master-addr {host}: no such address") from None


def _numeric(host: str) -> Address:
    return ip_address(host.partition("%")[0])


@contextmanager
def bind(master_addr: str, port: int, interface: str | None) -> Iterator[socket.socket]:
    """The port that other machines dial, taken but not yet listened on: they find nobody there until the hub runs.

    Raises:
        AddressInUse: taken, or not ours to take.
        ConfigurationError: --master-addr is no address of this machine, or --cluster-interface no interface of it.
    """
    host = resolve(master_addr) if interface is None else address_of(interface, master_addr)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
        try:
            sock.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigurationError(
                    f"--master-addr {master_addr} is not an address of this machine; give the one by which the others reach it"
                ) from error
            raise AddressInUse(_why(host, port, error)) from error
        sock.setblocking(False)
        yield sock


def _why(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use; choose another with --master-port, the same on all machines"
        case errno.EACCES:
            return f"port {port} needs more rights than this user has; choose one from 1024 up with --master-port"
    return f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}"


def hold_port(host: str) -> tuple[socket.socket, int]:
    """A port that nobody has, and the socket that keeps it from others until it is closed."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.bind((host, 0))
    except OSError:
        sock.close()
        raise
    return sock, sock.getsockname()[1]


def free_port(host: str) -> int:
    """One that nobody has at this moment."""
    sock, port = hold_port(host)
    sock.close()
    return port


def tcp_url(host: str, port: int) -> str:
    """An `init_method` of torch.distributed."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
