"""Reports: what people and programs read."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from bench.machine import describe_machine
from dashinfer.bench import report
from dashinfer.bench.measure import Run, Settings
from dashinfer.bench.stats import Figures
from dashinfer.bench.target import Target

MACHINE = {
    "cpu": "Some CPU",
    "cores": 2,
    "gpus": [],
    "python": "3.11.7",
    "versions": {"torch": "2.13.0", "vllm": None},
    "commit": "abc",
    "uncommitted_changes": False,
}
MEMORY = {"startup_seconds": 4.25, "memory_start": {"parent": 2**20 * 100, "workers": [2**20 * 900]}, "memory_end": None}


def figures(tokens_per_second: float, **rest: object) -> Figures:
    usual = dict.fromkeys((field.name for field in fields(Figures)), 0.012)
    counts = {"requests": 4, "errors": 0, "prompt_tokens": 105.0, "cached_tokens": 0.0, "output_tokens": 64.0}
    return Figures(**{**usual, **counts, "tokens_per_second": tokens_per_second, **rest})


def run(label: str, *speeds: float, **rest: object) -> Run:
    target = Target(label=label, url="http://h/v1", model="m")
    result = Run(target, dialect="usage", answer="It is\nParis.")
    result.levels = {concurrency: [figures(speed * concurrency, **rest) for speed in speeds] for concurrency in (1, 4)}
    return result


@pytest.fixture
def runs() -> list[Run]:
    return [run("ours", 30, 20, 10), run("peer", 10, 10, 10)]


def test_rows_go_by_concurrency_and_then_by_server(runs: list[Run]) -> None:
    assert [row[:4] for row in report.rows(runs, "peer")] == [
        ("ours", "1", "20.0", "2.00x"),
        ("peer", "1", "10.0", ""),
        ("ours", "4", "80.0", "2.00x"),
        ("peer", "4", "40.0", ""),
    ]
    assert report.rows(runs, None)[0][3:] == ("", "12.0 / 12.0 / 12.0", "12.0 / 12.0 / 12.0", "105 (0) / 64", "0")


def test_what_a_server_does_not_say_is_a_dash() -> None:
    silent = run("ours", 1, ttft_p50=None, cached_tokens=None, prompt_tokens=None, ttft_p90=0.25)

    row = report.rows([silent], None)[0]

    assert row[4] == "- / 250 / 12.0"
    assert row[6] == "- (-) / 64"


def test_servers_that_see_are_compared_by_images(runs: list[Run]) -> None:
    settings = Settings(images=((224, 224), (640, 480)))
    for number, run in enumerate(runs):
        run.levels = {4: [figures(99.0, requests_per_second=speed / (1 + number)) for speed in (30.0, 20.0, 10.0)]}

    text = report.as_markdown(runs, settings, "peer", MACHINE, {}, "python -m bench.vlm --url u")
    level = report.as_json(runs, settings, "peer", MACHINE, {})["targets"][0]["levels"][0]

    assert level["ratio"] == 2
    assert "A picture (JPEG; 224x224, 640x480 pixels in turn) and a short question a request, 64 tokens out" in text
    assert "| server | conc. | images/s | ratio |" in text
    assert "| ours | 4 | 20.0 | 2.00x |" in text
    assert "`ratio` is images/s over peer's" in text
    assert "'It is Paris.' to what a picture of a red circle shows" in text


def test_json_holds_every_round_and_round_trips(runs: list[Run]) -> None:
    result = report.as_json(runs, Settings(), "peer", MACHINE, {"ours": MEMORY})

    assert json.loads(json.dumps(result, allow_nan=False))["targets"][0]["startup_seconds"] == 4.25
    ours = result["targets"][0]["levels"][0]
    assert ours["concurrency"] == 1
    assert ours["ratio"] == 2
    assert ours["median"]["tokens_per_second"] == 20
    assert [round_["tokens_per_second"] for round_ in ours["rounds"]] == [30, 20, 10]


def test_markdown_says_how_it_was_made(runs: list[Run]) -> None:
    text = report.as_markdown(runs, Settings(), "peer", MACHINE, {"ours": MEMORY}, "python -m bench.serve --url u")

    assert "| ours | 1 | 20.0 | 2.00x |" in text
    assert "Some CPU, 2 cores; Python 3.11.7; torch 2.13.0; commit abc." in text
    assert "'It is Paris.'" in text
    assert "First answer 4.2 s after the command." in text
    assert "parent 100 MiB, processes below it 900 MiB" in text
    assert "\npython -m bench.serve --url u\n" in text


def test_caveats_name_what_spoils_figures() -> None:
    spoiled = run("ours", 1, errors=2, output_tokens=40.0, cached_tokens=90.0)
    spoiled.errors = ["HTTP 500: boom"]

    found = "\n".join(report.caveats([spoiled], Settings(concurrency=(1,))))

    assert "2 of 4 requests failed, such as: HTTP 500: boom" in found
    assert "40.0 tokens, not 64" in found
    assert "prefix cache" in found
    assert report.caveats([run("ours", 1)], Settings()) == []


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine()

    assert machine["cores"] >= 1
    assert machine["versions"]["trio"]
    assert set(MACHINE) <= set(machine)
    assert "host" not in json.dumps(machine).lower()


def test_the_plot_is_an_image(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dashinfer.bench.plot import draw

    runs[1].levels[4] = [figures(1, ttft_p50=None, ttft_p99=None)]
    for rate in ("tokens_per_second", "requests_per_second"):
        draw(runs, tmp_path / f"{rate}.svg", rate)

        assert "<svg" in (tmp_path / f"{rate}.svg").read_text()
