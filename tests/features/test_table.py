"""Rows from runs, and texts against rows."""

from pathlib import Path

import pytest

from . import table
from .catalogue import CATALOGUE, Feature
from .run import Proof, Run
from .table import Row

KNOWN = {
    "Endpoints": (Feature("Chat", "`/chat`"), Feature("Text", "`/text`")),
    "GPU": (Feature("Graphs", "always", ()), Feature("Norms", "always", ("^norm-", "^sum$"))),
}
BOTH = {"sm_80": "passed", "sm_90": "passed"}


def run(*proofs: tuple[str, str, dict[str, int]], gpu: str | None = None, **variants: dict[str, str]) -> Run:
    features = [Proof(area=area, feature=feature, **counts) for area, feature, counts in proofs]
    return Run(gpu=gpu, features=features, variants={name.replace("_", "-"): ends for name, ends in variants.items()})


def text(markdown: str) -> str:
    return f"# A\n\n{table.BEGIN}\n\n{markdown}\n\n{table.END}\n\nmore\n"


@pytest.mark.parametrize(
    ("counts", "cpu"),
    [
        ({"passed": 1}, "tested"),
        ({"passed": 3, "skipped": 2, "needs_gpu": 1}, "tested"),
        ({"passed": 3, "failed": 1}, None),
        ({"failed": 1}, None),
        ({"skipped": 2}, None),
        ({"skipped": 2, "needs_gpu": 1}, None),
        ({"skipped": 2, "needs_gpu": 2}, ""),
        ({"failed": 1, "skipped": 2, "needs_gpu": 2}, None),
        ({"passed_on_gpu": 1}, None),
        ({}, None),
    ],
    ids=str,
)
def test_when_a_feature_is_a_row(counts: dict[str, int], cpu: str | None) -> None:
    expected = [] if cpu is None else [Row("GPU", "Graphs", "always", cpu, "not yet run")]

    assert table.rows(KNOWN, run(("GPU", "Graphs", counts))) == expected


def test_rows_have_the_catalogues_order_whatever_the_runs_is() -> None:
    proofs = [("GPU", "Graphs", {"passed": 1}), ("Endpoints", "Text", {"passed": 1}), ("Endpoints", "Chat", {"passed": 1})]

    assert [row.name for row in table.rows(KNOWN, run(*proofs))] == ["Endpoints: Chat", "Endpoints: Text", "GPU: Graphs"]


@pytest.mark.parametrize(
    ("variants", "cell"),
    [
        ({}, "not yet run"),
        ({"norm_1": BOTH, "norm_2": {"sm_90": "passed"}, "sum": BOTH | {"gfx942": "passed"}}, "compiled for sm_80, sm_90"),
        ({"norm_1": BOTH, "norm_2": {"sm_90": "failed"}, "sum": BOTH}, "compiled for sm_80"),
        ({"norm_1": BOTH, "sum": {"sm_80": "skipped", "sm_90": "passed"}}, "compiled for sm_90"),
        ({"norm_1": BOTH}, "not yet run"),
        ({"norm_1": BOTH, "summary": BOTH}, "not yet run"),
        ({"norm_1": {"gfx942": "passed"} | BOTH, "sum": {"gfx942": "passed"} | BOTH}, "compiled for sm_80, sm_90, gfx942"),
    ],
)
def test_what_is_compiled_is_all_that_the_feature_needs(variants: dict[str, dict[str, str]], cell: str) -> None:
    (row,) = table.rows(KNOWN, run(("GPU", "Norms", {"passed": 1}), **variants))

    assert row.gpu == cell


@pytest.mark.parametrize(
    ("counts", "cell"),
    [
        ({"passed_on_gpu": 2}, "tested on A, B; compiled for sm_80, sm_90"),
        ({"passed_on_gpu": 2, "failed_on_gpu": 1}, "tested on B; compiled for sm_80, sm_90"),
        ({"passed": 9}, "tested on B; compiled for sm_80, sm_90"),
    ],
)
def test_what_runs_on_gpus_add(counts: dict[str, int], cell: str) -> None:
    here = run(("GPU", "Norms", {"passed": 1}), norm_1=BOTH, sum=BOTH)
    there = [run(("GPU", "Norms", counts), gpu="A"), run(("GPU", "Norms", {"passed_on_gpu": 1}), gpu="B")]

    assert table.rows(KNOWN, here, there) == [Row("GPU", "Norms", "always", "tested", cell)]


def test_a_feature_that_fails_here_is_no_row_whatever_a_gpu_proved() -> None:
    there = run(("GPU", "Norms", {"passed_on_gpu": 1}), gpu="A")

    assert table.rows(KNOWN, run(("GPU", "Norms", {"failed": 1})), [there]) == []
    assert table.rows(KNOWN, run(), [there]) == [Row("GPU", "Norms", "always", "", "tested on A")]


ROWS = [
    Row("Endpoints", "Chat", "`/chat`", "tested", ""),
    Row("Endpoints", "Text", "`/text`", "tested", ""),
    Row("GPU", "Graphs", "always", "", "not yet run"),
    Row("GPU", "Norms", "always", "tested", "tested on A; compiled for sm_80"),
]


def test_what_is_written_is_read() -> None:
    written = table.replace(text(""), table.as_markdown(ROWS))

    assert table.parse(written) == ROWS
    assert table.replace(written, table.as_markdown(ROWS)) == written
    assert written.endswith(f"{table.END}\n\nmore\n")
    assert "| **Endpoints** | Chat |" in written
    assert "\n| | Text |" in written


@pytest.mark.parametrize(
    ("row", "more", "less"),
    [
        (ROWS[3], [], []),
        (Row("GPU", "Norms", "never", "tested", ROWS[3].gpu), ["how never"], ["how always"]),
        (Row("GPU", "Norms", "always", "", ROWS[3].gpu), [], ["CPU tested"]),
        (Row("GPU", "Norms", "always", "proven", ROWS[3].gpu), ["CPU proven"], ["CPU tested"]),
        (Row("GPU", "Norms", "always", "tested", "tested on A, B"), ["GPU tested on B"], ["GPU compiled for sm_80"]),
        (Row("GPU", "Norms", "always", "tested", "not yet run"), [], ["GPU compiled for sm_80, GPU tested on A"]),
        (
            Row("GPU", "Norms", "always", "tested", "tested on A; compiled for sm_80, sm_90"),
            ["GPU compiled for sm_90"],
            [],
        ),
        (
            Row("GPU", "Norms", "always", "tested", ""),
            ["GPU has no part"],
            ["GPU compiled for sm_80, GPU tested on A"],
        ),
    ],
)
def test_what_a_changed_row_claims(row: Row, more: list[str], less: list[str]) -> None:
    claimed = [*ROWS[:3], row]

    assert table.excess(claimed, ROWS) == [f"GPU: Norms ({what})" for what in more]
    assert table.excess(ROWS, claimed) == [f"GPU: Norms ({what})" for what in less]


def test_rows_that_only_one_side_has() -> None:
    assert table.excess(ROWS, ROWS[1:]) == ["Endpoints: Chat"]
    assert table.excess(ROWS[1:], ROWS) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (f"{table.BEGIN}\n", "no single table"),
        (f"{table.END}\n{table.BEGIN}\n", "no single table"),
        (text("") + text(""), "no single table"),
        (text("| a | b |"), "head"),
        (text(table.as_markdown(ROWS).replace("| Text |", "| Text | and |")), "not a row"),
        (text(table.as_markdown(ROWS) + "\nand others"), "not a row"),
    ],
)
def test_what_is_no_table(broken: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table.parse(broken)


def test_a_text_without_a_table() -> None:
    assert table.parse("# A\n") == []
    with pytest.raises(ValueError, match="no lines"):
        table.replace("# A\n", "")


def test_readme_has_a_table_of_the_catalogues_rows() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    claimed = [(row.area, row.feature, row.how) for row in table.parse(readme)]
    known = [(area, feature.name, feature.how) for area, features in CATALOGUE.items() for feature in features]

    assert len(claimed) >= 40
    assert claimed == [row for row in known if row in claimed]
    assert len(known) == len(set(known)) <= 64
