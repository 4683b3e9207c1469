import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dashinfer_kernels import tuning


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_device", lambda: "NVIDIA H200")
    tuning._table.cache_clear()
    yield tmp_path / "nvidia_h200.json"
    tuning._table.cache_clear()


def test_finds_what_was_measured(table: Path) -> None:
    table.write_text(json.dumps({"norm": [{"key": [3584, "bf16"], "config": {"num_warps": 8}}]}))

    assert tuning.lookup("norm", (3584, "bf16")) == {"num_warps": 8}
    assert tuning.lookup("norm", (3584,)) is None
    assert tuning.lookup("rope", (3584, "bf16")) is None


def test_without_a_table_there_is_nothing(table: Path) -> None:
    assert tuning.lookup("norm", (3584, "bf16")) is None


def test_a_table_is_read_once(table: Path) -> None:
    table.write_text(json.dumps({"norm": [{"key": [1], "config": {"num_warps": 8}}]}))
    tuning.lookup("norm", (1,))
    table.unlink()

    assert tuning.lookup("norm", (1,)) == {"num_warps": 8}


@pytest.mark.parametrize("text", ["{", "[]", '{"norm": [{"key": [1]}]}', '{"norm": {"key": 1}}'])
def test_a_broken_table_is_refused(table: Path, text: str) -> None:
    table.write_text(text)

    with pytest.raises(ValueError, match="not a tuning table"):
        tuning.lookup("norm", (1,))


def test_names_become_file_names() -> None:
    assert tuning.config_path("AMD Instinct MI300X (gfx942)").name == "amd_instinct_mi300x_gfx942.json"


@pytest.mark.parametrize("path", sorted((Path(tuning.__file__).parent / "configs").glob("*.json")), ids=lambda path: path.name)
def test_tables_of_the_package_are_well_formed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "config_path", lambda name: path)
    tuning._table.cache_clear()

    assert tuning._table(path.stem)

    tuning._table.cache_clear()
