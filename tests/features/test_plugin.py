"""The plugin in small runs of its own: what is noted, and when a run ends red for what README claims."""

import pytest

from . import plugin, table
from .catalogue import Feature
from .run import Proof, Run, read, write

CATALOGUE = {
    "Area": (
        Feature("One", "`one`"),
        Feature("Two", "`two`"),
        Feature("Graphs", "always", ("^kernel$",)),
        Feature("Node", "`node`", needs="Node"),
    ),
}
CONFTEST = """
    from tests.features import plugin
    from tests.features.plugin import pytest_addoption
    from tests.features.test_plugin import CATALOGUE

    def pytest_configure(config):
        plugin.register(config, CATALOGUE)
"""
SETTINGS = """
    [pytest]
    testpaths = checks
    addopts = --strict-markers -p no:hypothesispytest -m 'not clients'
    filterwarnings = error
    markers =
        gpu: needs one
        clients: the longer part
"""
HEAD = """
import pytest

one = pytest.mark.feature("Area", "One")
two = pytest.mark.feature("Area", "Two")
graphs = pytest.mark.feature("Area", "Graphs")
skipped = pytest.mark.skip(reason="no")
"""
ONE = "@one\ndef test_one(): pass\n"
TWO = "@two\ndef test_two(): pass\n"
COMPILED = "@pytest.mark.compiles('kernel', 'sm_90')\ndef test_kernel(): pass\n"
ON_GPU = "@graphs\n@pytest.mark.gpu\ndef test_graphs(): pass\n"


class Project:
    """A folder with tests and a README, run in this process."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester
        self.folder = pytester.path
        self.readme = pytester.path / "README.md"
        pytester.makeconftest(CONFTEST)
        pytester.makefile(".ini", pytest=SETTINGS)
        pytester.mkdir("checks")

    def write(self, *tests: str, name: str = "test_a") -> None:
        (self.folder / "checks" / f"{name}.py").write_text(HEAD + "\n\n".join(tests))

    def claim(self, *rows: tuple[str, str, str, str]) -> None:
        found = [table.Row("Area", *row) for row in rows]
        markers = f"{table.BEGIN}\n{table.END}\n"
        self.readme.write_text(table.replace(markers, table.as_markdown(found)))

    def run(self, *arguments: str) -> pytest.RunResult:
        return self._pytester.runpytest_inprocess(*arguments)

    def proven(self, *arguments: str) -> Run:
        self.run("--features", "found.json", *arguments)
        return read(self.folder / "found.json")

    def rows(self, *arguments: str) -> list[tuple[str, str, str]]:
        return [(row.feature, row.cpu, row.gpu) for row in table.rows(CATALOGUE, self.proven(*arguments))]


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


@pytest.mark.parametrize(
    ("test", "rows"),
    [
        (ONE, ["One"]),
        ("@one\n@two\ndef test_both(): pass", ["One", "Two"]),
        ("pytestmark = [two, one]\ndef test_any(): pass", ["One", "Two"]),
        ("@two\nclass TestIt:\n    @one\n    def test_both(self): pass\n    def test_other(self): pass", ["One", "Two"]),
        ("@pytest.mark.parametrize('x', [pytest.param(1, marks=one), 2])\ndef test_some(x): assert x == 1", ["One"]),
        ("@pytest.fixture(params=[pytest.param(1, marks=two)])\ndef x(request): pass\ndef test_it(x): pass", ["Two"]),
        ("@one\n@skipped\ndef test_no(): pass\n" + ONE, ["One"]),
        ("def test_unmarked(): pass", []),
        ("", []),
        ("@one\ndef test_fails(): assert False", []),
        ("@one\ndef test_fails(): assert False\n" + ONE, []),
        ("@pytest.mark.parametrize('x', [1, 2])\n@one\ndef test_half(x): assert x == 1", []),
        ("@one\ndef test_absent(nothing): pass", []),
        ("@pytest.fixture\ndef x():\n    yield\n    assert False\n@one\ndef test_left(x): pass", []),
        ("@one\n@skipped\ndef test_no(): pass", []),
        ("@one\ndef test_no(): pytest.skip('no')", []),
        ("@one\n@pytest.mark.xfail\ndef test_no(): assert False", []),
        ("@one\n@pytest.mark.xfail\ndef test_oh(): pass", []),
        ("@graphs\n@pytest.mark.gpu\n@skipped\ndef test_graphs(): pass", ["Graphs"]),
        ("@graphs\n@skipped\ndef test_graphs(): pass", []),
        ("pytest.skip('all', allow_module_level=True)\n" + ONE, []),
    ],
)
def test_which_rows_a_test_makes(project: Project, test: str, rows: list[str]) -> None:
    project.write(test)

    assert [name for name, _, _ in project.rows()] == rows


def test_what_is_written(project: Project) -> None:
    project.write(
        TWO, ONE, "@one\n@pytest.mark.parametrize('x', [1, 2])\ndef test_more(x): assert x == 1", COMPILED,
        "@pytest.mark.compiles('kernel', 'gfx942')\ndef test_none(): assert False",
        "@graphs\n@pytest.mark.gpu\n@skipped\ndef test_graphs(): pass",
    )  # fmt: skip
    first = project.proven()

    assert first == Run(
        features=[
            Proof(area="Area", feature="One", passed=2, failed=1),
            Proof(area="Area", feature="Two", passed=1),
            Proof(area="Area", feature="Graphs", skipped=1, needs_gpu=1),
        ],
        variants={"kernel": {"gfx942": "failed", "sm_90": "passed"}},
    )
    assert project.rows() == [("Two", "tested", ""), ("Graphs", "", "compiled for sm_90")]
    content = (project.folder / "found.json").read_bytes()
    project.run("--features", "again.json")
    assert (project.folder / "again.json").read_bytes() == content


def test_any_part_of_a_run_claims_no_more(project: Project) -> None:
    project.write(ONE, TWO, COMPILED, "@one\ndef test_late(): pass")
    every = set(project.rows())
    parts = [project.rows("-k", words) for words in ("one", "two", "one or kernel", "late", "nothing")]

    assert [len(part) for part in parts] == [1, 1, 1, 1, 0]
    assert set().union(*parts) == every


def test_what_runs_on_a_gpu_is_counted_apart(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "gpu_name", lambda: "NVIDIA Toy")
    project.write(ONE, ON_GPU, "@pytest.fixture\ndef triton_path(): pass\n@two\ndef test_kernel(triton_path): pass")
    run = project.proven()

    assert run.gpu == "NVIDIA Toy"
    assert {proof.feature: (proof.passed, proof.passed_on_gpu) for proof in run.features} == {
        "One": (1, 0),
        "Two": (0, 1),
        "Graphs": (0, 1),
    }


@pytest.mark.parametrize(
    ("marker", "words"),
    [("('Area', 'Three')", "('Area', 'Three')"), ("('One',)", "('One',)"), ("('Area', 'One', how='x')", "('Area', 'One')")],
)
def test_a_row_that_the_catalogue_lacks_is_an_error(project: Project, marker: str, words: str) -> None:
    project.write(f"@pytest.mark.feature{marker}\ndef test_it(): pass".replace("('One',)", "('One')"))
    result = project.run("-k", "nothing")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*test_it: no row of tests/features/catalogue.py is {words}"])


ROW_ONE, ROW_GRAPHS = ("One", "`one`", "tested", ""), ("Graphs", "always", "tested", "compiled for sm_90")
GRAPHS = "@graphs\ndef test_graphs(): pass\n"


@pytest.mark.parametrize(
    ("rows", "tests", "claim"),
    [
        ([ROW_ONE], [ONE], None),
        ([ROW_ONE], [ONE.replace("@one", "")], "Area: One"),
        ([ROW_ONE], [TWO], "Area: One"),
        ([ROW_ONE], ["@skipped\n" + ONE], "Area: One"),
        ([ROW_ONE], ["@one\n@pytest.mark.xfail\ndef test_one(): assert False"], "Area: One"),
        ([("Three", "`three`", "tested", "")], [ONE], "Area: Three"),
        ([("One", "`--one`", "tested", "")], [ONE], "Area: One (how `--one`)"),
        ([("One", "`one`", "tested", "tested on A")], [ONE], "Area: One (GPU tested on A)"),
        ([ROW_GRAPHS], [GRAPHS, COMPILED], None),
        ([ROW_GRAPHS], [GRAPHS], "Area: Graphs (GPU compiled for sm_90)"),
        ([ROW_GRAPHS], ["@pytest.mark.gpu\n@skipped\n" + GRAPHS, COMPILED], "Area: Graphs (CPU tested)"),
        ([("Graphs", "always", "", "compiled for sm_90")], ["@pytest.mark.gpu\n@skipped\n" + GRAPHS, COMPILED], None),
        ([ROW_GRAPHS], [GRAPHS, COMPILED.replace("sm_90", "sm_80")], "Area: Graphs (GPU compiled for sm_90)"),
    ],
)
def test_a_whole_run_fails_where_readme_claims_more(
    project: Project, rows: list[tuple[str, str, str, str]], tests: list[str], claim: str | None
) -> None:
    project.claim(*rows)
    project.write(*tests)
    result = project.run()

    assert result.ret == (pytest.ExitCode.OK if claim is None else pytest.ExitCode.TESTS_FAILED)
    if claim is None:
        result.stdout.no_fnmatch_line("*table of features*")
    else:
        result.stdout.fnmatch_lines([f"claims what this run did not prove: {claim}", f"It is written by: {plugin.COMMANDS}"])


@pytest.mark.parametrize(
    ("test", "complains"),
    [
        ("@skipped\ndef test_node(): pass", False),
        ("@skipped\ndef test_node(): pass\n@node\ndef test_more(): assert False", True),
        ("@pytest.mark.clients\ndef test_node(): pass", True),
        ("def test_node(): pass", False),
    ],
)
def test_what_a_machine_lacks_is_only_told(project: Project, test: str, complains: bool) -> None:
    project.claim(("Node", "`node`", "tested", ""))
    project.write(ONE, "node = pytest.mark.feature('Area', 'Node')\n@node\n" + test)
    result = project.run()

    assert result.ret == (pytest.ExitCode.TESTS_FAILED if complains else pytest.ExitCode.OK)
    told = "claims what needs Node, which this run did not have: Area: Node"
    if "skipped" in test and not complains:
        result.stdout.fnmatch_lines([told])
    else:
        result.stdout.no_fnmatch_line(told)


def test_the_longer_part_may_be_left_out(project: Project) -> None:
    project.claim(ROW_ONE)
    project.write(TWO, "@one\n@pytest.mark.clients\ndef test_one(): pass")
    result = project.run()

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["claims what this run did not prove: Area: One"])


def test_a_red_run_names_the_rows_too(project: Project) -> None:
    project.claim(ROW_ONE)
    project.write("@one\ndef test_one(): assert False")
    result = project.run("checks")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["claims what this run did not prove: Area: One"])


def test_what_is_proven_and_not_claimed_is_told(project: Project) -> None:
    project.claim(ROW_ONE)
    project.write(ONE, TWO)
    result = project.run()

    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["leaves out what this run proved: Area: Two"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "two"),
        ("-k", "test"),
        ("-m", "not gpu"),
        ("-m", "clients or not clients"),
        ("checks/test_a.py",),
        ("--deselect", "checks/test_a.py::test_one"),
        ("--ignore", "checks/test_b.py"),
        ("--lf",),
        ("--collect-only",),
        ("--setup-only",),
    ],
)
def test_a_part_of_a_run_is_not_compared(project: Project, arguments: tuple[str, ...]) -> None:
    project.claim(ROW_ONE)
    project.write(TWO, "def test_one(): pass")
    project.write("def test_other(): pass", name="test_b")
    if arguments == ("--lf",):
        project.run("-k", "test")
    result = project.run(*arguments)

    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*table of features*")


def test_a_run_from_which_a_plugin_takes_tests_is_not_compared(project: Project) -> None:
    project.claim(ROW_ONE)
    project.write(ONE, TWO)
    (project.folder / "checks" / "conftest.py").write_text(
        "def pytest_collection_modifyitems(config, items):\n    config.hook.pytest_deselected(items=[items.pop(0)])\n"
    )
    result = project.run()

    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.no_fnmatch_line("*table of features*")


def test_a_run_that_stops_is_not_compared(project: Project) -> None:
    project.claim(ROW_ONE)
    project.write("def test_first(): assert False", ONE)

    project.run("-x").stdout.no_fnmatch_line("*table of features*")


def test_stored_runs_on_gpus_bear_claims_out(project: Project) -> None:
    project.claim(("Graphs", "always", "tested", "tested on A"))
    project.write(GRAPHS)
    assert project.run().ret == pytest.ExitCode.TESTS_FAILED

    results = project.folder / "bench" / "results"
    results.mkdir(parents=True)
    path = results / "gpu-a.features.json"
    write(Run(gpu="A", features=[Proof(area="Area", feature="Graphs", passed_on_gpu=1)]), path)
    assert project.run().ret == pytest.ExitCode.OK

    path.write_text("{")
    result = project.run()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*gpu-a.features.json is no file of --features*"])


@pytest.mark.parametrize("readme", [None, "# No table\n"])
def test_without_a_table_there_is_no_claim(project: Project, readme: str | None) -> None:
    if readme is not None:
        project.readme.write_text(readme)
    project.write(ONE)
    result = project.run()

    assert result.ret == pytest.ExitCode.OK
    result.stdout.no_fnmatch_line("*table of features*")


def test_a_table_that_cannot_be_read_is_red(project: Project) -> None:
    project.claim(ROW_ONE)
    project.readme.write_text(project.readme.read_text().replace("| How |", "| |"))
    project.write(ONE)
    result = project.run()

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["the table's head is not*"])
