"""The real backend, up to where a worker would start."""

import json
from pathlib import Path

import pytest

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, StartupError, UnsupportedModel
from dashinfer.serving.backend import ModelBackend

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "max_position_embeddings": 512}  # fmt: skip


def resolve(folder: Path, config: dict, **settings: int) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    ModelBackend().resolve(ServerConfig(model=str(folder), load_format="dummy", **settings), lambda *event: None)


def test_a_model_that_can_be_served(tmp_path: Path) -> None:
    resolve(tmp_path, {"architectures": ["LlamaForCausalLM"], **SHAPE}, max_length=512)


@pytest.mark.parametrize(
    ("config", "settings", "kind", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, {}, UnsupportedModel, "MambaForCausalLM is not supported"),
        ({"architectures": [7]}, {}, UnsupportedModel, "config.json makes no sense"),
        ({"architectures": ["LlamaForCausalLM"], **SHAPE}, {"max_length": 513}, ConfigurationError, "--max-length 513"),
    ],
)
def test_what_cannot_be_served_needs_no_worker_to_say_so(
    tmp_path: Path, config: dict, settings: dict, kind: type[StartupError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        resolve(tmp_path, config, **settings)
