"""Schemathesis on our own description of the API: requests drawn from /openapi.json, valid and invalid, to every route.

The model is a small random one that says anything, with a real engine.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess
from tests.serving.fake_engine import write_tokenizer

from .conftest import HERE, KEY, needs, run

pytestmark = pytest.mark.feature("Endpoints", "API as a document")

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method", "ignored_auth", "use_after_free"),
)
METHODS = {"get", "post", "delete"}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 261,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("toy") / "demo"
    folder.mkdir()
    template = (HERE / "chat_template.jinja").read_text()
    files = write_tokenizer(folder, template, ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({**files.tokenizer_config, "chat_template": template}))
    (folder / "config.json").write_text(json.dumps(MODEL))
    server = ServerProcess.start(
        *("--model", str(folder), "--load-format", "dummy", "--api-keys", KEY, "--kv-cache-memory", "64MiB")
    )
    yield server
    assert server.stop() == 0


def fuzz(server: ServerProcess, folder: Path, *options: str) -> None:
    needs("schemathesis")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml")),
        *("run", f"{server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS)),
        *("--seed", "1", "--generation-database", "none", "--no-color", *options),
    ]
    said = run(command, folder)
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    operations = sum(len(path.keys() & METHODS) for path in document["paths"].values())

    assert f"  Tested: {operations}\n" in said


def test_a_few_requests(toy: ServerProcess, tmp_path: Path) -> None:
    fuzz(toy, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "5")


@pytest.mark.clients
def test_many_requests(toy: ServerProcess, tmp_path: Path) -> None:
    fuzz(toy, tmp_path, "--phases", "examples,coverage,fuzzing,stateful", "--max-examples", "100")
