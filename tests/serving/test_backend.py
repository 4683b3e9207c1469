"""The real backend, up to where a worker would start."""

import json
from pathlib import Path
from typing import Any

import pytest

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, StartupError, UnsupportedModel
from dashinfer.serving.backend import ModelBackend

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "max_position_embeddings": 512}  # fmt: skip


AWQ = {"architectures": ["LlamaForCausalLM"], **SHAPE, "quantization_config": {"quant_method": "awq", "bits": 4}}


def resolve(folder: Path, config: dict, **settings: Any) -> None:
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
        (
            {"architectures": ["LlamaForCausalLM"], **SHAPE},
            {"quant_type": "gptq"},
            UnsupportedModel,
            "is not a GPTQ checkpoint",
        ),
        (AWQ, {"quant_type": "fp8"}, UnsupportedModel, r"is quantised already \(AWQ in 4 bits\); leave out --quant-type"),
        (
            AWQ | {"quantization_config": {"quant_method": "aqlm"}},
            {},
            UnsupportedModel,
            "quantised with aqlm are not supported",
        ),
    ],
)
def test_what_cannot_be_served_needs_no_worker_to_say_so(
    tmp_path: Path, config: dict, settings: dict, kind: type[StartupError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        resolve(tmp_path, config, **settings)
