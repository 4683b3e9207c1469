"""`dashinfer_bench` from its flags to its exit status, against a small server over real connections."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dashinfer.bench.cli import levels, main, make_parser, mark, percentages, rates, read_settings, read_targets
from dashinfer.bench.command import without_secrets
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

pytestmark = pytest.mark.feature("Operations", "A load generator")

ROOT = Path(__file__).parents[2]
WARM_UP = 6  # requests before a round with --concurrency 2: two to probe, two to calibrate, two to warm up


class Server(http.server.ThreadingHTTPServer):
    """Answers at once, with as many pieces as tokens were asked for; counts words as tokens, and 10 for its template.

    Attributes:
        seen: bodies of requests, in order.
        heads: their paths and headers.
        on_request: called with a request's number, from 1 on; its answer, if not None, is the status of a refusal.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.on_request: Callable[[int], int | None] = lambda number: None
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client has left

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200, b'{"data": [{"id": "first"}, {"id": "second"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.heads.append((self.path, dict(self.headers)))
            number = len(self.server.seen)
        if (status := self.server.on_request(number)) is not None:
            self.answer(status, b"refused")
            return
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        pieces = [{"choices": [{"delta": {"content": "a "}, "text": "a "}]}] * body["max_tokens"]
        usage = {"prompt_tokens": 10 + len(text.split()), "completion_tokens": body["max_tokens"]}
        chunks = [*map(json.dumps, [*pieces, {"choices": [], "usage": usage}]), "[DONE]"]
        self.answer(200, "".join(f"data: {chunk}\n\n" for chunk in chunks).encode())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


SMALL = ["--concurrency", "2", "--rounds", "1", "--prompt-tokens", "60", "--output-tokens", "4"]


def test_a_url_is_all_it_needs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", server.url, *SMALL]) == 0

    out = capsys.readouterr().out
    assert {path for path, _ in server.heads} == {"/v1/chat/completions"}
    assert {body["model"] for body in server.seen} == {"first"}
    assert len(server.seen) == WARM_UP + 4
    assert len({body["messages"][0]["content"] for body in server.seen[WARM_UP:]}) == 4
    assert all(name in out for name in ("req/s", "tok/s", "60 (-) / 4", "TTFT", "TPOT", "ITL", "E2E", "p50", "p90", "p99"))


def test_results_are_written_without_keys(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    out = tmp_path / "folder" / "out.json"
    flags = ["--api-key", "sk-secret", "--header", "X-Tenant: secret", "--body", '{"temperature": 0.5}', "--model", "m"]
    asked = ["--goodput", "ttft:60000", "e2e:0.001", "--percentiles", "5,99.9", "--detailed", "--out", str(out)]

    assert main(["--url", server.url, *SMALL, *flags, *asked]) == 0

    assert {(head["Authorization"], head["X-Tenant"]) for _, head in server.heads} == {("Bearer sk-secret", "secret")}
    assert {(body["model"], body["temperature"]) for body in server.seen[WARM_UP:]} == {("m", 0.5)}
    found = json.loads(out.read_text())
    (level,) = found["targets"][0]["levels"]
    assert (level["concurrency"], level["request_rate"], level["median"]["requests"], found["interrupted"]) == (
        2,
        None,
        4,
        False,
    )
    assert (level["median"]["good_requests"], level["median"]["goodput"]) == (0, 0)
    assert {"ttft_p5", "ttft_p99.9", "itl_p50", "e2e_mean"} < set(level["median"])
    assert len(level["rounds"][0]["samples"]) == 4
    markdown = out.with_suffix(".md").read_text()
    assert "| p5 | p99.9 |" in markdown
    assert "--api-key ... --header ... --body" in markdown
    everything = markdown + out.read_text() + capsys.readouterr().out
    assert "secret" not in everything.replace(str(tmp_path), "")
    pytest.importorskip("matplotlib")
    assert "<svg" in out.with_suffix(".svg").read_text()


def test_the_key_may_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")

    assert main(["--url", server.url, *SMALL]) == 0
    assert {head["Authorization"] for _, head in server.heads} == {"Bearer sk-env"}


def test_json_has_standard_output_for_itself(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    rate = ["--request-rate", "inf", "--max-concurrency", "3", "--requests", "5", "--endpoint", "completions"]

    assert main(["--url", server.url, *SMALL[2:], *rate, "--json"]) == 0

    captured = capsys.readouterr()
    (level,) = json.loads(captured.out)["targets"][0]["levels"]
    assert (level["request_rate"], level["concurrency"], level["median"]["requests"]) == ("inf", None, 5)
    assert level["median"]["late_p50"] >= 0
    assert "asked req/s" in captured.err
    assert {path for path, _ in server.heads} == {"/v1/completions"}


def test_a_file_is_what_is_asked(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {index}", "output_tokens": 3}) + "\n" for index in range(6)))

    flags = ["--concurrency", "2", "--rounds", "1", "--dataset", str(file)]
    assert main(["--url", server.url, *flags]) == 0

    asked = server.seen[WARM_UP - 2 :]  # nothing to calibrate
    assert len(asked) == 4
    assert {body["max_tokens"] for body in asked} == {3}
    assert all(body["messages"][0]["content"].startswith("Question ") for body in asked)


def test_requests_that_fail_are_the_exit_status(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.on_request = lambda number: 503 if number == WARM_UP + 2 else None

    assert main(["--url", server.url, *SMALL]) == 1
    assert "1 of 4 requests failed, such as: HTTP 503: refused" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_shows_what_was_measured(
    number: signal.Signals, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)

    def interrupt(request: int) -> None:
        if request == WARM_UP + 4 + 2 + 1:  # the third of the second round
            os.kill(os.getpid(), number)
            released.wait(30)

    released = threading.Event()
    server.on_request = interrupt
    flags = ["--requests", "4", "--rounds", "9", "--concurrency", "1", "--warmup", "2", "--json"]

    status = main(["--url", server.url, *SMALL, *flags])
    released.set()

    captured = capsys.readouterr()
    found = json.loads(captured.out)
    (level,) = found["targets"][0]["levels"]
    assert status == 130
    assert found["interrupted"] is True
    assert [round_["requests"] for round_ in level["rounds"]] == [4, 2]
    assert level["median"]["errors"] == 0
    assert "interrupted: the tables have what was answered until then" in captured.err
    assert "TTFT" in captured.err
    assert signal.getsignal(number) is handler


def test_interrupted_early_it_says_so(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.on_request = lambda number: os.kill(os.getpid(), signal.SIGINT)

    assert main(["--url", server.url, *SMALL]) == 130
    assert capsys.readouterr().err == "dashinfer_bench: interrupted before anything was measured\n"


def test_the_url_has_a_default_and_targets_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    parse = make_parser().parse_args
    both = ["--target", "a=http://a/v1=x", "--url", "http://b", "--model", "y", "--label", "b"]
    bodies = ["--body", 'a={"k": 1}', "--body", '{"k": 2, "j": 3}']

    assert read_targets(parse([])) == [Target(label="server", url="http://127.0.0.1:8000/v1")]
    assert read_targets(parse([*both, *bodies])) == [
        Target(label="a", url="http://a/v1", model="x", body={"k": 2, "j": 3}),
        Target(label="b", url="http://b/v1", model="y", body={"k": 2, "j": 3}),
    ]
    assert read_targets(parse([*both, "--body", 'a={"k": 1}']))[1].body == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "a=http://a", "--target", "a=http://b"], "same label"),
        (["--url", "http://b", "--body", "a={}"], "'a' is no target; there are server"),
        (["--url", "localhost:8000"], "'localhost:8000' is not a URL; write --url"),
        (["--target", "a=http://a", "--model", "m"], "--model goes with --url"),
    ],
)
def test_targets_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_targets(make_parser().parse_args(arguments))


def test_flags_become_settings() -> None:
    settings = read_settings(
        make_parser().parse_args(
            [
                *("--request-rate", "0.5,inf,0.5", "--arrivals", "constant", "--output-tokens", "9", "--seed", "3"),
                *("--goodput", "ttft:500", "--goodput", "e2el:2000"),
            ]
        )
    )

    assert settings.request_rate == (0.5, float("inf"))
    assert (settings.arrivals, settings.output_tokens, settings.seed, settings.dataset) == ("constant", 9, 3, None)
    assert settings.goodput == (("ttft", 0.5), ("e2e", 2.0))
    assert read_settings(make_parser().parse_args([])) == type(settings)()
    assert levels("1,4,4,16") == (1, 4, 16)
    assert percentages("50,99.9,50") == (50, 99.9)
    assert mark("itl:12.5") == ("itl", 0.0125)
    assert rates("2") == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "1,x"], "not a list of numbers such as 1,4,16"),
        (["--request-rate", "1,x"], "not a list of rates such as 0.5,2,inf"),
        (["--request-rate", "0"], "0 is not above 0"),
        (["--request-rate", "nan"], "nan is not above 0"),
        (["--request-rate", "1", "--concurrency", "1"], "not allowed with"),
        (["--requests", "1", "--duration", "1"], "not allowed with"),
        (["--duration", "inf"], "inf is not finite"),
        (["--percentiles", "50,101"], "not a list of percentiles"),
        (["--goodput", "ttft"], "not a mark such as ttft:500"),
        (["--goodput", "tokens:3"], "not a mark such as ttft:500"),
        (["--output", "3"], "unrecognized arguments"),
        (["--range-ratio", "2"], "--range-ratio is not from 0 to below 1"),
        (["--dataset", "/no/such/file"], "cannot read --dataset /no/such/file: No such file"),
        (["--baseline", "b"], "'b' is no target"),
        (["--out", "x.txt"], "--out x.txt does not end in .json"),
        (["--url", "http://127.0.0.1:9"], "server (http://127.0.0.1:9/v1) does not list its models"),
        (["--url", "http://127.0.0.1:9", "--model", "m"], "server does not answer: ConnectError"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code

    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("dashinfer_bench: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_results_that_cannot_be_written_are_not_measured(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.mkdir()

    assert main(["--url", server.url, *SMALL, "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"dashinfer_bench: error: --out {out} cannot be written\n"
    assert server.seen == []


def test_secrets_are_not_shown() -> None:
    command = ["x", "--api-key", "a", "--header=a:b", "--api-key=c", "--body", "d"]

    assert without_secrets(command) == ["x", "--api-key", "...", "--header=...", "--api-key=...", "--body", "d"]


def python(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_imports_nothing_heavy_and_names_every_option() -> None:
    code = """
import sys
from dashinfer.bench.cli import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "numpy", "trio", "rich", "h11", "ssl", "matplotlib", "PIL", "pydantic"} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""

    result = python(code)

    assert result.returncode == 0, result.stderr
    assert result.stderr == "heavy: []\n"
    for flag in ("--request-rate", "--dataset", "--goodput", "--percentiles", "--duration", "--seed", "--api-key", "--warmup"):
        assert flag in result.stdout


def test_a_run_imports_no_torch(server: Server) -> None:
    code = """
import sys
from dashinfer.bench.cli import main
status = main(sys.argv[1:])
print({"torch", "numpy", "pydantic", "dashinfer.serving"} & set(sys.modules), status)
"""

    result = python(code, "--url", server.url, *SMALL)

    assert result.stdout.endswith("set() 0\n"), result.stderr


@pytest.mark.parametrize(("missing", "named", "flags"), [("trio", "trio", []), ("PIL", "pillow", ["--images", "9x9"])])
def test_without_the_extra_it_says_what_to_install(missing: str, named: str, flags: list[str]) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from dashinfer.bench.cli import main; sys.exit(main(sys.argv[1:]))"

    result = python(code, *flags)

    assert result.returncode == 2
    assert result.stderr == f'dashinfer_bench: error: {named} not installed; pip install "dashinfer[bench]"\n'


def test_as_many_connections_are_open_as_there_are_requests(server: Server) -> None:
    all_there = threading.Barrier(60)

    def wait_for_all(number: int) -> None:
        if number > WARM_UP - 2:  # nothing to warm up
            all_there.wait(10)

    server.on_request = wait_for_all
    code = """
import resource, sys
from dashinfer.bench.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (48, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.exit(main(sys.argv[1:]))
"""

    result = python(code, "--url", server.url, *SMALL[2:], "--request-rate", "inf", "--requests", "60", "--warmup", "0")

    assert result.returncode == 0, result.stdout + result.stderr


def test_as_a_module_too() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dashinfer.bench", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )

    assert result.stdout.startswith("dashinfer ")
