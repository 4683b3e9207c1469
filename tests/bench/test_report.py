"""Reports: what people and programs read."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bench.machine import describe_machine
from dashinfer.bench import report
from dashinfer.bench.measure import Run
from dashinfer.bench.settings import Settings
from dashinfer.bench.stats import Figures, Sample
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
TIMES = {f"{name}_{of}": 0.012 for name in ("ttft", "tpot", "itl", "e2e") for of in ("mean", "p50", "p90", "p99")}
MEMORY = {"startup_seconds": 4.25, "memory_start": {"parent": 2**20 * 100, "workers": [2**20 * 900]}, "memory_end": None}


def figures(tokens_per_second: float, **rest: object) -> Figures:
    usual: dict[str, Any] = dict.fromkeys((field.name for field in fields(Figures)), 0.5)
    counts = {"requests": 4, "errors": 0, "prompt_tokens": 105.0, "cached_tokens": 0.0, "output_tokens": 64.0}
    unasked = {"wanted_tokens": 64.0, "good_requests": None, "goodput": None, "times": TIMES}
    return Figures(**{**usual, **counts, **unasked, "tokens_per_second": tokens_per_second, **rest})


def run(label: str, *speeds: float, **rest: object) -> Run:
    target = Target(label=label, url="http://h/v1", model="m")
    result = Run(target, dialect="usage", answer="It is\nParis.")
    result.levels = {concurrency: [figures(speed * concurrency, **rest) for speed in speeds] for concurrency in (1, 4)}
    return result


@pytest.fixture
def runs() -> list[Run]:
    return [run("ours", 30, 20, 10), run("peer", 10, 10, 10)]


def test_rows_go_by_concurrency_and_then_by_server(runs: list[Run]) -> None:
    settings = Settings(concurrency=(1, 4))

    assert report.columns(settings, "peer")[:6] == ("server", "conc.", "req/s", "tok/s in", "tok/s", "ratio")
    assert [row[:2] + row[4:6] for row in report.rows(runs, settings, "peer")] == [
        ("ours", "1", "20.0", "2.00x"),
        ("peer", "1", "10.0", ""),
        ("ours", "4", "80.0", "2.00x"),
        ("peer", "4", "40.0", ""),
    ]
    assert "ratio" not in report.columns(settings, None)
    assert report.rows(runs, settings, None)[0] == ("ours", "1", "0.50", "0.5", "20.0", "105 (0) / 64", "0")


def test_times_are_a_row_each_with_the_percentiles_asked_for() -> None:
    times = {**TIMES, "ttft_mean": 0.25, "ttft_p50": None, "e2e_p99.9": 1.5}
    settings = Settings(concurrency=(1,), percentiles=(50, 99.9))

    rows = report.time_rows([run("ours", 1, times=times)], settings)

    assert report.time_columns(settings) == ("server", "conc.", "ms", "mean", "p50", "p99.9")
    assert rows == [
        ("ours", "1", "TTFT", "250", "-", "-"),
        ("ours", "1", "TPOT", "12.0", "12.0", "-"),
        ("ours", "1", "ITL", "12.0", "12.0", "-"),
        ("ours", "1", "E2E", "12.0", "12.0", "1500"),
    ]


def test_what_a_server_does_not_say_is_a_dash() -> None:
    silent = run("ours", 1, cached_tokens=None, prompt_tokens=None, prompt_tokens_per_second=None)

    row = report.rows([silent], Settings(concurrency=(1,)), None)[0]

    assert (row[3], row[5]) == ("-", "- (-) / 64")


def test_an_open_loop_shows_rates_goodput_and_lateness() -> None:
    settings = Settings(request_rate=(0.5, float("inf")), goodput=(("ttft", 0.5), ("e2e", 2.0)))
    result = run("ours", 1, good_requests=3, goodput=1.5)
    result.levels = {0.5: result.levels[1], float("inf"): result.levels[4]}

    found = report.as_json([result], settings, None)
    text = report.as_markdown([result], settings, None, None, {}, "dashinfer_bench")

    assert report.columns(settings, None)[:4] == ("server", "asked req/s", "req/s", "good req/s")
    assert [row[1:4] for row in report.rows([result], settings, None)] == [
        ("0.5", "0.50", "1.50 (75%)"),
        ("inf", "0.50", "1.50 (75%)"),
    ]
    assert [row[2] for row in report.time_rows([result], settings)][:5] == ["TTFT", "TPOT", "ITL", "E2E", "sent late"]
    assert [level["request_rate"] for level in found["targets"][0]["levels"]] == [0.5, "inf"]
    assert json.loads(json.dumps(found, allow_nan=False))["settings"]["request_rate"] == [0.5, "inf"]
    assert "Poisson arrivals. Prompts of 105 tokens, 64 tokens out, greedy" in text
    assert "A good request keeps to: TTFT 500 ms, E2E 2000 ms." in text


def test_the_load_and_the_prompts_are_told() -> None:
    for settings, words in (
        (Settings(range_ratio=0.5), "Closed loop. Prompts of 105 tokens, 64 tokens out (each 50% up or down), greedy"),
        (Settings(shared_prefix=50, prefixes=3), "Prompts of 105 tokens, 50 of them one of 3 prefixes, 64 tokens out"),
        (Settings(shared_prefix=50, rounds=1), "50 of them the same in all, 64 tokens out, greedy, streamed; one round."),
        (Settings(dataset="a.jsonl"), "Closed loop. Prompts of a.jsonl, greedy, streamed; medians of 3 rounds."),
        (
            Settings(request_rate=(1.0,), arrivals="constant", max_concurrency=4),
            "Arrivals at constant intervals, at most 4 requests under way. Prompts",
        ),
    ):
        assert words in report.as_markdown([], settings, None, None, {}, "dashinfer_bench")


def test_an_interrupted_run_shows_what_there_is(runs: list[Run]) -> None:
    settings = Settings(concurrency=(1, 4, 16))
    del runs[1].levels[4]

    assert [row[:2] for row in report.rows(runs, settings, "peer")] == [("ours", "1"), ("peer", "1"), ("ours", "4")]
    assert report.rows(runs, settings, "peer")[2][5] == ""
    assert report.as_json(runs, settings, "peer", interrupted=True)["interrupted"] is True
    assert "Interrupted." in report.as_markdown(runs, settings, "peer", MACHINE, {}, "c", interrupted=True)
    assert len(report.as_tables(runs, settings, "peer")[0].rows) == 3


def test_details_are_those_of_each_request() -> None:
    result = run("ours", 1)
    sample = Sample(started=7.5, due=7.0, first=8.0, last=9.0, finished=9.5, output_tokens=3, gaps=(0.25, 0.75), error="no")
    result.samples = {1: [[Sample(started=5.0, finished=6.0), sample]], 4: [[]]}

    levels = report.as_json([result], Settings(), None, detailed=True)["targets"][0]["levels"]

    assert levels[0]["rounds"][0]["samples"][1] == {
        "sent": 2.5,
        **{"ttft": 0.5, "tpot": 0.5, "e2e": 2.0, "late": 0.5},
        **{"prompt_tokens": None, "cached_tokens": None, "output_tokens": 3, "wanted_tokens": None},
        **{"gaps": (0.25, 0.75), "error": "no"},
    }
    assert "samples" not in report.as_json([result], Settings(), None)["targets"][0]["levels"][0]["rounds"][0]


def test_servers_that_see_are_compared_by_images(runs: list[Run]) -> None:
    settings = Settings(images=((224, 224), (640, 480)), concurrency=(4,))
    for number, run in enumerate(runs):
        run.levels = {4: [figures(99.0, requests_per_second=speed / (1 + number)) for speed in (30.0, 20.0, 10.0)]}

    text = report.as_markdown(runs, settings, "peer", MACHINE, {}, "python -m bench.vlm --url u")
    level = report.as_json(runs, settings, "peer", MACHINE, {})["targets"][0]["levels"][0]

    assert level["ratio"] == 2
    assert "A picture (JPEG; 224x224, 640x480 pixels in turn) and a short question a request, 64 tokens out" in text
    assert "| server | conc. | images/s | tok/s in | tok/s | ratio |" in text
    assert "| ours | 4 | 20.00 | 0.5 | 99.0 | 2.00x |" in text
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

    assert "| ours | 1 | 0.50 | 0.5 | 20.0 | 2.00x |" in text
    assert "| ours | 1 | TTFT | 12.0 | 12.0 | 12.0 | 12.0 |" in text
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


def test_caveats_know_what_was_asked_for() -> None:
    spoiled = run("ours", 1, cached_tokens=90.0, times={**TIMES, "late_p99": 0.25})
    spoiled.levels = {1.0: spoiled.levels[1]}

    assert report.caveats([spoiled], Settings(concurrency=(1,), shared_prefix=90))[1:] == []  # of lateness alone
    assert "its questions come again" in report.caveats([spoiled], Settings(concurrency=(1,), dataset="a"))[0]
    late = report.caveats([spoiled], Settings(request_rate=(1.0,), shared_prefix=90))
    assert "one request in 100 was sent 250 ms after it was due or later; connecting was slow" in late[0]


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine()

    assert machine["cores"] >= 1
    assert machine["versions"]["trio"]
    assert set(MACHINE) <= set(machine)
    assert "host" not in json.dumps(machine).lower()


def test_the_plot_is_an_image(runs: list[Run], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dashinfer.bench.plot import draw

    runs[1].levels[4] = [figures(1, times={**TIMES, "ttft_p50": None, "ttft_p99": None})]
    closed = Settings(concurrency=(1, 4))
    for settings in (closed, Settings(concurrency=(1, 4), images=((1, 1),)), Settings(request_rate=(1, 4, float("inf")))):
        draw(runs, tmp_path / "plot.svg", settings)

        assert "<svg" in (tmp_path / "plot.svg").read_text()
        (tmp_path / "plot.svg").unlink()


def test_a_plot_without_a_number_is_an_image_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from dashinfer.bench.plot import draw

    nothing = Run(Target(label="ours", url="http://h/v1"))
    short = run("ours", 1, times={**TIMES, "tpot_p50": None})
    for number, item in enumerate((nothing, short)):
        draw([item], tmp_path / f"{number}.svg", Settings(concurrency=(1,)))

        assert "<svg" in (tmp_path / f"{number}.svg").read_text()
