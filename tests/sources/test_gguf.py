import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dashinfer.errors import ConfigurationError, ModelNotFound, UnsupportedModel
from dashinfer.gguf_header import BLOCKS, read_header
from dashinfer.sources import ReportProgress
from dashinfer.sources.gguf import resolve_gguf
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.tokenizer import Tokenizer

WriteGGUF = Callable[..., Path]


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    known = {kind.value: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}

    assert {kind: known[kind] for kind in BLOCKS} == BLOCKS


def test_header_is_what_the_gguf_package_reads(write_gguf: WriteGGUF) -> None:
    path = write_gguf(tensors={"output.weight": np.ones((40, 32), np.float16)}, a=True, b=1.5, c=[1, 2], d=["x", "é"])
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}

    assert header.metadata == expected
    assert {name: (info.shape, info.offset) for name, info in header.tensors.items()} == {
        tensor.name: (tuple(tensor.shape), tensor.data_offset) for tensor in reader.tensors
    }


def test_lists_can_be_left_out(write_gguf: WriteGGUF) -> None:
    path = write_gguf(tensors={"output.weight": np.ones((40, 32), np.float16)}, a=True, c=[1, 2], d=["x", "é"], e=[True], z=7)
    whole, short = read_header(path), read_header(path, lists=False)

    assert short.tensors == whole.tensors
    assert short.metadata == {key: value for key, value in whole.metadata.items() if not isinstance(value, list)}
    assert short.metadata["z"] == 7


@pytest.mark.parametrize("lists", [True, False])
def test_lists_of_lists_are_refused(tmp_path: Path, lists: bool) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(UnsupportedModel, match="has a list of lists"):
        read_header(path, lists=lists)


def test_configuration(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    path = write_gguf()
    source = resolve_gguf(path, report=report)

    assert source.files.format == "gguf"
    assert source.files.weights == (str(path),)
    assert source.files.config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": pytest.approx(1e-5), "rope_theta": 10000.0,
        "vocab_size": source.files.config["vocab_size"], "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 39, "eos_token_id": 40,
    }  # fmt: skip
    assert source.generation_config == {"eos_token_id": [40]}
    assert source.tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(("family", "architecture"), [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_families(write_gguf: WriteGGUF, report: ReportProgress, family: str, architecture: str) -> None:
    extra = {f"{family}.attention.key_length": 16, f"{family}.attention.value_length": 16, f"{family}.rope.freq_base": 1e6}
    config = resolve_gguf(write_gguf(family=family, **extra), report=report).files.config

    assert (config["architectures"], config["model_type"]) == ([architecture], family)
    assert (config["head_dim"], config["rope_theta"]) == (16, 1e6)
    assert "attention_bias" not in config


def test_an_output_matrix_unties_the_embeddings(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    path = write_gguf(tensors={"output.weight": np.zeros((40, 32), np.float32)})

    assert resolve_gguf(path, report=report).files.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 4.0,
                "llama__rope__scaling__original_context_length": 64,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        ({"llama__rope__scaling__type": "none"}, None),
    ],
)
def test_rope_scaling(write_gguf: WriteGGUF, report: ReportProgress, metadata: dict, expected: dict | None) -> None:
    assert resolve_gguf(write_gguf(**metadata), report=report).files.config.get("rope_scaling") == expected


def llama3_divisors(factor: float, theta: float, dimensions: int) -> list[float]:
    """As in transformers' `_compute_llama3_parameters`, one wavelength at a time."""
    divisors = []
    for i in range(0, dimensions, 2):
        wavelength = 2 * np.pi * theta ** (i / dimensions)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def test_llama3_rope_scaling_is_found_again(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    sizes = {"llama__attention__key_length": 64, "llama__attention__value_length": 64, "llama__rope__freq_base": 500000.0}
    divisors = np.array(llama3_divisors(32.0, 500000.0, 64), np.float32)
    config = resolve_gguf(write_gguf(tensors={"rope_freqs.weight": divisors}, **sizes), report=report).files.config

    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    with pytest.raises(UnsupportedModel, match="in a way of its own"):
        resolve_gguf(write_gguf("odd.gguf", tensors={"rope_freqs.weight": divisors[::-1].copy()}, **sizes), report=report)


def test_sampling_defaults_and_ends(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    path = write_gguf(
        **{"general.sampling.temp": 0.5, "general.sampling.top_k": 7, "tokenizer.ggml.eot_token_id": 3},
        **{"tokenizer.ggml.tokens": [*"abcd", "ab", "<|eot_id|>", "<|other|>"], "tokenizer.ggml.token_type": [1] * 5 + [3, 3]},
        **{"tokenizer.ggml.eos_token_id": 4, "tokenizer.ggml.bos_token_id": 0},
    )
    source = resolve_gguf(path, report=report)

    assert source.generation_config == {"temperature": 0.5, "top_k": 7, "eos_token_id": [3, 4, 5]}
    assert Tokenizer.from_source(source).eos_token_ids == (3, 4, 5)


def test_a_second_start_reads_the_cache(write_gguf: WriteGGUF, report: ReportProgress, reports: list, cache: Path) -> None:
    path = write_gguf()
    first = resolve_gguf(path, report=report)

    assert reports == [("tokenizer", 0, 1, ""), ("tokenizer", 1, 1, "")]
    assert resolve_gguf(path, report=report) == first
    assert len(reports) == 2
    os.utime(path, ns=(1, 1))
    resolve_gguf(path, report=report)

    assert len(reports) == 4
    assert len(list((cache / "gguf").iterdir())) == 2


def test_a_damaged_cache_is_made_again(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    path = write_gguf()
    first = resolve_gguf(path, report=report)
    first.tokenizer.tokenizer_json.unlink()

    assert resolve_gguf(path, report=report) == first
    assert first.tokenizer.tokenizer_json.is_file()


def test_a_cache_that_cannot_be_written(write_gguf: WriteGGUF, report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf()
    monkeypatch.setenv("DASHINFER_CACHE", str(path / "below-a-file"))
    with pytest.raises(ConfigurationError, match="cannot write to the cache directory"):
        resolve_gguf(path, report=report)


def test_special_tokens_and_template(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    source = resolve_gguf(write_gguf(), report=report)
    tokenizer = Tokenizer.from_source(source)
    template = ChatTemplate.from_files(source.tokenizer, tokenizer.special_tokens)

    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tokenizer.encode(template.render([{"role": "user", "content": "<|im_start|>ab"}])) == [39, *tokenizer.encode("ab")]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"tokenizer__ggml__pre": "martian"}, "splits text by 'martian'"),
        ({"tokenizer__ggml__model": "bert"}, "tokeniser of the kind 'bert'"),
        ({"tokenizer__ggml__tokens": None, "tokenizer__ggml__token_type": None}, "no vocabulary"),
        ({"tokenizer__ggml__merges": None}, "no merges"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "differ in number"),
        ({"tokenizer__ggml__model": "llama"}, "no scores"),
        ({"llama__block_count": None}, "lacks the value llama.block_count"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__dimension_count": 4}, "unequal sizes or RoPE on a part"),
        ({"llama__attention__head_count_kv": [1, 2]}, "layers that differ"),
        ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "scales RoPE by 'longrope'"),
        ({"llama__attention__head_count": 0}, "makes no sense"),
        ({"llama__attention__head_count": "four"}, "makes no sense"),
        ({"tokenizer__ggml__bos_token_id": 4000, "tokenizer__ggml__add_bos_token": True}, "makes no sense"),
    ],
)
def test_what_cannot_be_served_is_said(write_gguf: WriteGGUF, report: ReportProgress, metadata: dict, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        resolve_gguf(write_gguf(**metadata), report=report)

    assert "\n" not in str(caught.value)


def test_an_unknown_architecture(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    with pytest.raises(UnsupportedModel, match="architecture 'mamba'; supported are llama, qwen2, qwen3"):
        resolve_gguf(write_gguf(family="mamba"), report=report)


@pytest.mark.parametrize("kept", [6, 20, 100, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short(write_gguf: WriteGGUF, report: ReportProgress, kept: float) -> None:
    path = write_gguf()
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    with pytest.raises(UnsupportedModel, match="cut short"):
        resolve_gguf(path, report=report)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + b"x" * 100, "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 2**62), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture None"),
    ],
)
def test_other_files(tmp_path: Path, report: ReportProgress, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match=words):
        resolve_gguf(path, report=report)


def test_parts_of_a_split_model_belong_together(write_gguf: WriteGGUF, report: ReportProgress) -> None:
    first = write_gguf("m-00001-of-00002.gguf")
    with pytest.raises(ModelNotFound, match=r"m-00002-of-00002\.gguf missing"):
        resolve_gguf(first, report=report)
    second = write_gguf("m-00002-of-00002.gguf", tensors={"output.weight": np.zeros((40, 32), np.float32)})

    for path in (first, second):
        source = resolve_gguf(path, report=report)

        assert source.files.weights == (str(first), str(second))
        assert source.files.config["tie_word_embeddings"] is False
