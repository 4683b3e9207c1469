"""The wheel that users install has the bench client, and its command starts from there."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel of this tree puts into site-packages."""
    scratch = tmp_path_factory.mktemp("wheel")
    source = scratch / "source"  # setuptools writes beside the sources
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("dashinfer", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", build, str(scratch)], cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(scratch / result.stdout.split()[-1]) as wheel:
        wheel.extractall(scratch / "site")
    return scratch / "site"


def test_the_wheel_has_every_module_of_the_client(installed: Path) -> None:
    modules = {path.name for path in (ROOT / "dashinfer" / "bench").glob("*.py")}

    assert {path.name for path in (installed / "dashinfer" / "bench").glob("*.py")} == modules
    assert not (installed / "bench").exists()


def test_the_command_starts_from_the_wheel(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    module, function = scripts["console_scripts"]["dashinfer_bench"].split(":")
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import {module} as m; print(m.__file__); sys.exit(m.{function}())"
    )

    result = subprocess.run(
        [sys.executable, "-I", "-c", code, "--help"], cwd=installed, capture_output=True, text=True, timeout=60, check=False
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(installed))
    assert "usage: dashinfer_bench" in result.stdout
