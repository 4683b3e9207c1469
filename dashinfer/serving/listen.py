"""The sockets and Hypercorn's settings.

`bind` takes the address before anything slow begins. The settings say why each differs from Hypercorn's default.
"""

import errno
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dashinfer.errors import AddressInUse, ConfigurationError

if TYPE_CHECKING:
    from hypercorn.config import Config

BACKLOG = 1024
KEEP_ALIVE = 75.0  # seconds that a connection may be without a request
STALLED_CLIENT = 60.0  # seconds after which a client that acknowledges nothing, or reads nothing, loses its connection


def _listener(family: int, address: tuple) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Accepted connections inherit it. Hypercorn writes under a shield with no deadline, so the kernel has to keep it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_CLIENT * 1000))
        if family == socket.AF_INET6 and address[0] != "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


@contextmanager
def bind(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listening, non-blocking sockets on every address of `host`; port 0 takes a free one, the same on all of them.

    Raises:
        AddressInUse: taken, not ours to take, or not an address of this machine.
        ConfigurationError: `host` is not a host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigurationError(
            f"--host {host}: no such address; use 0.0.0.0 for all, 127.0.0.1 for this machine only"
        ) from error
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, _, _, _, address in dict.fromkeys(found):
            if sockets:  # a host with several addresses has one port
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(stack.enter_context(_listener(family, address)))
            except OSError as error:
                if sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # a name such as localhost may have an address of a family that is switched off
                raise AddressInUse(_why(host, port, error)) from error
        yield sockets


@contextmanager
def bind_unix(path: Path) -> Iterator[list[socket.socket]]:
    """A listening, non-blocking Unix socket, whose file is gone afterwards. One that nobody listens on any more is replaced.

    Raises:
        AddressInUse: somebody listens there, something else is there, or the directory is not ours to write.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            _remove_stale(path)
            sock.bind(str(path))
            sock.listen(BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            raise AddressInUse(f"--uds {path}: {error.strerror or error}") from error
        try:
            yield [sock]
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Raises OSError where what is there is no socket, or somebody answers."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, "another server listens there")


def check_certificate(certificate: Path, key: Path) -> None:
    """Raises ConfigurationError where the two cannot be used together."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ConfigurationError(f"--ssl-certfile {certificate} and --ssl-keyfile {key} cannot be used: {reason}") from error


def _why(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use; choose another with --port, or --port 0 for a free one"
        case errno.EACCES:
            return f"port {port} needs more rights than this user has; choose one from 1024 up with --port"
        case errno.EADDRNOTAVAIL:
            return f"{host} is not an address of this machine; use --host 0.0.0.0 for all of them"
    return f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}"


def url(sockets: list[socket.socket], *, tls: bool = False) -> str:
    """The address to type into a browser on this machine; of a Unix socket, `unix:` and its path."""
    if sockets[0].family == socket.AF_UNIX:
        return f"unix:{sockets[0].getsockname()}"
    host, port = sockets[0].getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if tls else 'http'}://{host}:{port}"


def hypercorn_config(
    sockets: list[socket.socket],
    *,
    graceful_timeout: float,
    certificate: Path | None = None,
    key: Path | None = None,
    root_path: str = "",
) -> "Config":
    """Settings of the HTTP server.

    Args:
        sockets: from `bind`; Hypercorn owns and closes them from here on, so that a drain really closes the port.
        graceful_timeout: seconds from shutdown until Hypercorn cuts what still runs.
        certificate, key: files in PEM, for HTTPS.
        root_path: that the application is mounted under.
    """
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.backlog = BACKLOG
    config.accesslog = None  # edge.py logs
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.h11_max_incomplete_size = 64 * 1024  # long Authorization and cookie headers of proxies
    config.keep_alive_timeout = KEEP_ALIVE  # 5 s: clients with a connection pool meet a connection that has just been closed
    config.keep_alive_max_requests = 2**31  # 1,000: a busy client is cut off for no reason
    config.h2_max_concurrent_streams = 1000
    config.graceful_timeout = graceful_timeout  # 3 s: too short for an answer
    config.shutdown_timeout = 10.0
    config.root_path = root_path
    if certificate is not None and key is not None:
        config.certfile, config.keyfile = str(certificate), str(key)
    return config
