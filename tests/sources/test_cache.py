import os
import time
from pathlib import Path

import pytest

from dashinfer.errors import ConfigurationError
from dashinfer.sources.cache import cache_directory, new_entry


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DASHINFER_CACHE", "~/own")

    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("DASHINFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    assert cache_directory() == tmp_path / "xdg" / "dashinfer"
    monkeypatch.delenv("XDG_CACHE_HOME")

    assert cache_directory() == tmp_path / ".cache" / "dashinfer"


def test_an_entry_appears_whole(cache: Path) -> None:
    target = cache / "kind" / "entry"
    with new_entry(target) as directory:
        (directory / "file").write_text("x")

        assert not target.exists()

    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_nothing(cache: Path) -> None:
    target = cache / "kind" / "entry"

    def interrupted() -> None:
        with new_entry(target) as directory:
            (directory / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_said(cache: Path) -> None:
    with pytest.raises(ConfigurationError, match="No space left on device; DASHINFER_CACHE"), new_entry(cache / "entry"):
        raise OSError(28, "No space left on device")


def test_an_error_of_the_block_is_its_own(cache: Path) -> None:
    with pytest.raises(OSError, match="Input/output error"), new_entry(cache / "entry"):
        raise OSError(5, "Input/output error")

    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(cache: Path) -> None:
    (cache / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write to the cache directory"), new_entry(cache / "file" / "entry"):
        pass


def test_who_comes_second_gives_way(cache: Path) -> None:
    target = cache / "entry"
    with new_entry(target) as directory:
        (directory / "file").write_text("second")
        with new_entry(target) as other:
            (other / "file").write_text("first")

    assert (target / "file").read_text() == "first"
    assert list(cache.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    for name, age in ((".entry.old", 2 * 86400), (".entry.new", 60), (".other.old", 2 * 86400)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    with new_entry(cache / "entry"):
        pass

    assert {path.name for path in cache.iterdir()} == {"entry", ".entry.new", ".other.old"}
