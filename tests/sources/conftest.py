"""A cache directory for each test, and .gguf files written by the `gguf` package, which our own reader is held to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

PIECES = [*"abcdefghijklmnopqrstuvwxyz Ġ0123456789", "ab"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DASHINFER_CACHE", str(directory))
    return directory


@pytest.fixture
def reports() -> list[tuple[str, int, int, str]]:
    return []


@pytest.fixture
def report(reports: list[tuple[str, int, int, str]]) -> Callable[[str, int, int, str], None]:
    return lambda *event: reports.append(event)


WriteGGUF = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a tiny Llama; keyword arguments add or replace metadata (None removes), `tensors` adds tensors."""

    def write(
        name: str = "tiny.gguf", *, family: str = "llama", tensors: dict[str, np.ndarray] | None = None, **metadata: Any
    ) -> Path:
        values: dict[str, Any] = {
            f"{family}.block_count": 2,
            f"{family}.context_length": 256,
            f"{family}.embedding_length": 32,
            f"{family}.feed_forward_length": 64,
            f"{family}.attention.head_count": 4,
            f"{family}.attention.head_count_kv": 2,
            f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*PIECES, "<|im_start|>", "<|im_end|>"],
            "tokenizer.ggml.token_type": [1] * len(PIECES) + [3, 3],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": len(PIECES),
            "tokenizer.ggml.eos_token_id": len(PIECES) + 1,
            "tokenizer.chat_template": "{{ messages[0].content }}",
            **{key.replace("__", "."): value for key, value in metadata.items()},
        }
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, family)
        for key, value in values.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value:
                writer.add_array(key, value)
        embeddings = np.zeros((len(values["tokenizer.ggml.tokens"] or [0]), 32), np.float32)
        for tensor, data in {"token_embd.weight": embeddings, **(tensors or {})}.items():
            writer.add_tensor(tensor, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
