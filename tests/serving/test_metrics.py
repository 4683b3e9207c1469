"""`/metrics`, and the dashboard that shows them."""

import json
import re
from collections.abc import Iterator
from importlib import resources

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from dashinfer.engine.api import EngineStats
from dashinfer.serving.metrics import Histogram, Metrics

from .conftest import Running, RunServer

pytestmark = pytest.mark.feature("Operations", "Metrics for Prometheus and Grafana")


class Scrape:
    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]
        self.names = {sample.name for sample in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have the labels."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == f"dashinfer:{name}" and labels.items() <= sample.labels.items()
        ]
        assert found, name
        return sum(found)


async def scrape(server: Running) -> Scrape:
    await server.service.idle()
    answer = await server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Scrape(answer.text)


async def test_before_the_model_is_loaded(run_server: RunServer) -> None:
    async with run_server(ready=False) as server:
        found = await scrape(server)

    assert found.value("num_requests_running", model_name="demo") == 0
    assert found.value("time_to_first_token_seconds_count") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_measured(run_server: RunServer, stream: bool) -> None:
    async with run_server() as server:
        await server.chat("say hello", stream=stream)
        found = await scrape(server)

    prompt = len("user: say hello") + 1
    assert found.value("request_success_total", finished_reason="stop") == 1
    assert found.value("request_success_total") == 1
    assert found.value("time_to_first_token_seconds_count") == 1
    assert 0 < found.value("time_to_first_token_seconds_sum") < 10
    assert found.value("inter_token_latency_seconds_count") == len("hello")  # between it and the end of the turn
    assert found.value("e2e_request_latency_seconds_sum") >= found.value("time_to_first_token_seconds_sum")
    assert found.value("request_queue_time_seconds_sum") == 0.25
    assert found.value("request_prompt_tokens_sum") == prompt
    assert found.value("request_generation_tokens_sum") == len("hello") + 1
    assert found.value("prefix_cache_queries_total") == prompt
    assert found.value("prefix_cache_hits_total") == prompt // 16 * 16
    assert found.value("http_requests_total", handler="/v1/chat/completions", method="POST", status="200") == 1


async def test_how_choices_end(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.at_once = 3
        await server.chat("say hello", max_tokens=2, n=3)
        await server.chat("say hello", stop="ll")
        with trio.move_on_after(0.5):
            await server.chat("wait ab", n=2)
        await server.engine.until(lambda: server.engine.running == 0)
        await server.client.get("/nowhere/secret")
        found = await scrape(server)

    reasons = {reason: found.value("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort")}
    assert reasons == {"stop": 1, "length": 3, "abort": 2}
    assert found.value("e2e_request_latency_seconds_count") == 2
    assert found.value("request_generation_tokens_count") == 4
    assert found.value("http_requests_total", status="499") == 1
    assert found.value("http_requests_total", handler="other", status="404") == 1


async def test_a_request_that_the_engine_loses(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.lost = RuntimeError("gone")
        await server.chat("say hello")
        found = await scrape(server)

    assert found.value("request_success_total", finished_reason="error") == 1
    assert found.value("http_requests_total", status="500") == 1


async def test_no_prefix_cache_no_queries(run_server: RunServer) -> None:
    async with run_server(disable_prefix_cache=True) as server:
        await server.chat("say hello")
        found = await scrape(server)

    assert found.value("prefix_cache_queries_total") == found.value("prefix_cache_hits_total") == 0


async def test_the_engines_own_counts(run_server: RunServer) -> None:
    async with run_server(served_model_name="mine") as server:
        server.engine.stats = lambda: EngineStats(3, 4, 100, 25, 5, 6, 700, 80, 9, 8, 2)
        found = await scrape(server)

    names = {
        "num_requests_running": 3, "num_requests_waiting": 4, "kv_cache_usage_perc": 0.25, "num_preemptions_total": 6,
        "prompt_tokens_total": 700, "generation_tokens_total": 80, "mm_cache_queries_total": 9, "mm_cache_hits_total": 8,
        "worker_restarts_total": 2,
    }  # fmt: skip
    assert {name: found.value(name, model_name="mine") for name in names} == names


async def test_they_are_behind_the_keys_and_in_the_newer_format_too(run_server: RunServer) -> None:
    async with run_server(api_keys=("sk-1",)) as server:
        refused = await server.client.get("/metrics")
        headers = {"authorization": "Bearer sk-1", "accept": "application/openmetrics-text; version=1.0.0"}
        answer = await server.client.get("/metrics", headers=headers)

    assert refused.status_code == 401
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_histogram() -> None:
    histogram = Histogram((1.0, 2.5))
    for value in (0.5, 1.0, 2.0, 9.0):
        histogram.observe(value)
    histogram.observe(2.5, 3)

    assert histogram.buckets() == [("1.0", 2.0), ("2.5", 6.0), ("+Inf", 7.0)]
    assert histogram.sum == 20.0


def expressions(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


async def test_the_dashboard_asks_for_what_there_is(run_server: RunServer) -> None:
    dashboard = json.loads(resources.files("dashinfer.serving").joinpath("grafana.json").read_text())
    queries = list(expressions(dashboard))
    asked = {name for query in queries for name in re.findall(r"dashinfer:\w+", query)}
    async with run_server() as server:
        await server.chat("say hello")
        found = await scrape(server)

    assert len(queries) > 20
    assert asked <= found.names
    names = {re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in found.names}
    shown = {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in asked}
    assert names == shown
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = {name for query in queries for name in re.findall(r"\$(\w+)", query)}
    assert used == {"model_name", "__rate_interval"}
    assert {"model_name", "datasource"} == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("version", ["abc", "=", "1..0", "\xff"])
def test_a_version_that_is_none_is_answered_with_the_usual_one(version: str) -> None:
    _, content_type = Metrics("demo").exposition(f"application/openmetrics-text;version={version}")

    assert content_type.startswith(("text/plain; version=", "application/openmetrics-text; version=1.0.0"))
