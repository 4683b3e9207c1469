"""`huggingface_hub` against a Hub on this machine. It reads its settings on import, so each test runs a process of its own."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.feature("Models", "From Hugging Face or a directory")

SHA = "0123456789abcdef0123456789abcdef01234567"
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "onnx/config.json": b"{}"}
QUANTISED = {"quantize_config.json": b'{"bits": 4}'}
SEES = {
    f"{name}.json": b"{}" for name in ("preprocessor_config", "video_preprocessor_config", "processor_config", "chat_template")
}
SHARDS = {"m-1.safetensors": b"1" * 3000, "m-2.safetensors": b"2" * 3000}
INDEX = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
REPOSITORIES = {
    "org/single": {**SMALL, "model.safetensors": b"w" * 5000, "pytorch_model.bin": b"pickle", "other.safetensors": b"x"},
    "org/sharded": {**SMALL, **SHARDS, "model.safetensors.index.json": INDEX, "consolidated.safetensors": b"x"},
    "org/unknown": {**SMALL, "config.json": b'{"model_type": "mamba"}', "model.safetensors": b"w" * 5000},
    "org/tokenless": {"config.json": SMALL["config.json"], "vocab.json": b"{}", "model.safetensors": b"w" * 5000},
    "org/gptq": {**SMALL, **QUANTISED, "gptq_model-4bit-128g.safetensors": b"w" * 5000, "other.safetensors": b"x"},
    "org/sees": {**SMALL, **SEES, "model.safetensors": b"w" * 5000},
    "org/pickle": {**SMALL, "pytorch_model.bin": b"pickle"},
    "org/quants-GGUF": {"m.Q4_0.gguf": b"GGUF"},
    "org/dataset": {"README.md": b"x"},
}
SCRIPT = """
import json, sys
from dashinfer.errors import StartupError, UnsupportedModel
from dashinfer.sources.resolve import resolve
def check(source):
    if source.files.config["model_type"] == "mamba":
        raise UnsupportedModel("the architecture mamba is not supported")
for model in sys.argv[2:]:
    reports = []
    try:
        source = resolve(model, load_format=sys.argv[1], check=check, report=lambda *event: reports.append(event))
        found = {"name": source.files.name, "weights": source.files.weights, "config": source.files.config}
    except StartupError as error:
        found = {"kind": type(error).__name__, "message": str(error)}
    print(json.dumps({**found, "reports": reports}))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        kind, _, rest = path.partition("/")
        if kind == "api":
            model, _, _ = rest.removeprefix("models/").partition("/revision/")
            model, _, tree = model.partition("/tree/")
            files = REPOSITORIES.get(model)
            if files is None:
                code = "GatedRepo" if model == "org/gated" else "RepoNotFound"
                self.answer(403 if code == "GatedRepo" else 401, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
            elif tree:
                listing = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
                self.answer(200, json.dumps(listing).encode(), {})
            else:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": model, "sha": SHA, "siblings": siblings}).encode(), {})
        else:
            model, _, name = path.partition(f"/resolve/{SHA}/")
            data = REPOSITORIES[model][name]
            self.answer(200, data, {"ETag": f'"{name}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolved(home: Path, endpoint: str, *models: str, load_format: str = "auto", **environment: str) -> list[dict]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, load_format, *models],
        env={**cleared, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "no_proxy": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_weights_are_fetched_and_kept(hub: str, tmp_path: Path) -> None:
    single, sharded = resolved(tmp_path, hub, "org/single", "org/sharded")

    assert single["name"] == "org/single"
    assert [Path(path).name for path in single["weights"]] == ["model.safetensors"]
    assert [Path(path).name for path in sharded["weights"]] == ["m-1.safetensors", "m-2.safetensors"]
    assert {path.name for path in tmp_path.rglob("snapshots/*/*")} == {
        "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json", *SHARDS,
    }  # fmt: skip
    assert {stage for stage, *_ in single["reports"]} <= {"download"}
    offline = resolved(tmp_path, "http://127.0.0.1:9", "org/single", "org/sharded", HF_HUB_OFFLINE="1")
    unreachable = resolved(tmp_path, "http://127.0.0.1:9", "org/single", "org/sharded")

    assert [found["weights"] for found in offline] == [single["weights"], sharded["weights"]]
    assert [found["weights"] for found in unreachable] == [single["weights"], sharded["weights"]]


def test_the_files_of_an_older_quantised_model(hub: str, tmp_path: Path) -> None:
    (found,) = resolved(tmp_path, hub, "org/gptq")

    assert found["config"]["quantization_config"] == {"quant_method": "gptq", "bits": 4}
    assert [Path(path).name for path in found["weights"]] == ["gptq_model-4bit-128g.safetensors"]


def test_the_files_of_a_model_that_sees(hub: str, tmp_path: Path) -> None:
    (found,) = resolved(tmp_path, hub, "org/sees")
    beside = {path.name for path in Path(found["weights"][0]).parent.iterdir()}

    assert beside >= SEES.keys()


def test_dummy_weights_are_not_fetched(hub: str, tmp_path: Path) -> None:
    (found,) = resolved(tmp_path, hub, "org/single", load_format="dummy")

    assert found["weights"] == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_served_is_not_fetched(hub: str, tmp_path: Path) -> None:
    found = resolved(tmp_path, hub, "org/unknown", "org/tokenless")

    assert "the architecture mamba is not supported" in found[0]["message"]
    assert "tokenizer.json" in found[1]["message"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_fetched_is_said(hub: str, tmp_path: Path) -> None:
    models = ["org/pickle", "org/quants-GGUF", "org/dataset", "org/missing", "org/gated", "org/bad..name"]
    found = resolved(tmp_path, hub, *models)
    expected = [
        ("UnsupportedModel", "org/pickle has PyTorch .bin weights only"),
        ("UnsupportedModel", "org/quants-GGUF has GGUF files only: download one"),
        ("UnsupportedModel", "org/dataset has no config.json"),
        ("ModelNotFound", "there is no org/missing on the Hugging Face Hub"),
        ("ModelNotFound", "org/gated is gated: ask for access"),
        ("ModelNotFound", "neither a path nor a valid Hugging Face ID"),
    ]

    for (kind, words), error in zip(expected, found, strict=True):
        assert error["kind"] == kind
        assert words in error["message"]
        assert "\n" not in error["message"]


def test_no_network(tmp_path: Path) -> None:
    (offline,) = resolved(tmp_path, "http://127.0.0.1:9", "org/single", HF_HUB_OFFLINE="1")
    (unreachable,) = resolved(tmp_path, "http://127.0.0.1:9", "org/single")
    (proxy,) = resolved(tmp_path, "http://example.invalid", "org/single", HTTP_PROXY="http://127.0.0.1:9", no_proxy="")

    assert "HF_HUB_OFFLINE is set" in offline["message"]
    assert "the Hub cannot be reached" in unreachable["message"]
    assert {offline["kind"], unreachable["kind"], proxy["kind"]} == {"ModelNotFound"}
