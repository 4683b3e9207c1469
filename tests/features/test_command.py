"""`python -m tests.features`."""

from pathlib import Path

import pytest

from . import __main__, table
from .catalogue import Feature
from .run import Proof, Run, write

CATALOGUE = {"Area": (Feature("One", "`one`"), Feature("Two", "`two`", ()))}
EMPTY = f"# A\n\n{table.BEGIN}\n{table.END}\n\nmore\n"


class Files:
    """A text, and files of runs, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "README.md"
        self.text.write_text(EMPTY)

    def run(self, *features: str, gpu: str | None = None, name: str = "run.json") -> Path:
        counts = {"passed_on_gpu": 1} if gpu else {"passed": 1}
        path = self.folder / name
        write(Run(gpu=gpu, features=[Proof(area="Area", feature=feature, **counts) for feature in features]), path)
        return path

    def main(self, *arguments: str | Path) -> int:
        return __main__.main([str(self.text), *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(__main__, "CATALOGUE", CATALOGUE)
    return Files(tmp_path)


def test_it_writes_what_it_then_finds(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    run = files.run("One", "Two")

    assert files.main(run, "--check") == 1
    assert capsys.readouterr().err == "claims less: Area: One\nclaims less: Area: Two\n"
    assert files.text.read_text() == EMPTY
    assert files.main(run) == 0
    assert "| **Area** | One | `one` | tested | |\n| | Two | `two` | tested | not yet run |\n" in files.text.read_text()
    assert files.main(run, "--check") == 0
    assert capsys.readouterr().err == ""


def test_it_names_what_differs(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.main(files.run("One", "Two"))
    files.text.write_text(files.text.read_text().replace("`one`", "`--one`"))

    assert files.main(files.run("One"), "--check") == 1
    assert capsys.readouterr().err == (
        "claims more: Area: One (how `--one`)\nclaims more: Area: Two\nclaims less: Area: One (how `one`)\n"
    )


def test_form_counts_too(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    run = files.run("One")
    files.main(run)
    files.text.write_text(files.text.read_text().replace("| One |", "|  One |"))

    assert files.main(run, "--check") == 1
    assert capsys.readouterr().err == "the rows are right, their order or form is not\n"


def test_runs_on_gpus_are_merged(files: Files) -> None:
    run, given = files.run("One"), files.run("Two", gpu="B", name="b.json")
    (files.folder / "bench" / "results").mkdir(parents=True)
    files.run("Two", gpu="A", name="bench/results/gpu-a.features.json")

    assert files.main(run, "--gpu", given) == 0
    assert "| | Two | `two` | | tested on A, B |\n" in files.text.read_text()
    assert files.main(run, "--check") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.json"], "none.json"),
        (["README.md"], "is no file of --features"),
        (["gpu.json"], "is of a run on A: give it with --gpu"),
        (["run.json", "--gpu", "run.json"], "ran on a GPU"),
    ],
)
def test_files_that_cannot_be_used(
    files: Files, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files.folder)
    files.run("One")
    files.run("One", gpu="A", name="gpu.json")

    with pytest.raises(SystemExit, match="2"):
        files.main(*arguments)
    assert words in capsys.readouterr().err
    assert files.text.read_text() == EMPTY


def test_a_text_without_a_place(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.text.write_text("# A\n")

    with pytest.raises(SystemExit, match="2"):
        files.main(files.run("One"))
    assert "has no lines <!-- features --> and <!-- /features -->" in capsys.readouterr().err
