"""GGUF files, written here by the `gguf` package for every type of tensor, read by ours."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.gguf import GGUFSource
from dashinfer.models.rope import inverse_frequencies
from dashinfer.models.weights import Part, WeightReader

from . import toy

Kind = GGMLQuantizationType
SHAPE = (40, 512)  # more than one head of 16 and not a multiple of a chunk's rows
KINDS = [
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
    Kind.Q2_K, Kind.Q3_K, Kind.IQ4_NL, Kind.IQ4_XS,
]  # fmt: skip


def encoded(kind: Kind, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Rows of a type as bytes. Types that `gguf` cannot write get random codes and finite scales."""
    generator = np.random.default_rng(0)
    try:
        return np.ascontiguousarray(gguf_quantize(generator.standard_normal(shape, dtype=np.float32), kind)).view(np.uint8)
    except NotImplementedError:
        pass
    weights, size = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    scale = np.array([0.013, 0.21], np.float16).view(np.uint8)
    if kind in (Kind.Q4_K, Kind.Q5_K):
        blocks[..., :4] = scale
    elif kind in (Kind.Q6_K, Kind.Q3_K):
        blocks[..., -2:] = scale[:2]
    elif kind is Kind.Q2_K:
        blocks[..., -4:] = scale
    else:
        blocks[..., :2] = scale[:2]
    return blocks.reshape(shape[0], -1)


def write(path, tensors: dict[str, tuple[Kind, np.ndarray]], architecture: str = "qwen2", *, vocabulary: int = 100) -> str:
    writer = GGUFWriter(path, architecture)
    writer.add_token_list([f"token {index}" for index in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_custom_alignment(64)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def read(source: GGUFSource, name: str, shape: tuple[int, ...], **share) -> torch.Tensor:
    part = Part(name, shape, **share)
    out = torch.full(part.local_shape, float("nan"))
    source.read_into(out, part)
    return out


@pytest.fixture
def open_gguf():
    """Opens sources, and closes them after the test."""
    sources = []

    def open_(*paths: str, head_dim: int = 16) -> GGUFSource:
        sources.append(GGUFSource(paths, head_dim=head_dim))
        return sources[-1]

    yield open_
    for source in sources:
        source.close()


@pytest.mark.feature("Models", "GGUF, with weights of 4 to 32 bits")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_reads_bit_for_bit_as_gguf_does(kind, tmp_path, open_gguf):
    data = encoded(kind)
    expected = torch.from_numpy(gguf_dequantize(data, kind).reshape(SHAPE).copy())
    assert expected.isfinite().all()
    assert expected.std() > 0

    source = open_gguf(write(tmp_path / "model.gguf", {"blk.2.ffn_down.weight": (kind, data)}))

    name = "model.layers.2.mlp.down_proj.weight"
    assert source.shape(name) == SHAPE
    assert source.sizes == {name: data.nbytes}
    assert torch.equal(read(source, name, SHAPE), expected)
    assert torch.equal(read(source, name, SHAPE, rows=(16, 37), columns=(32, 96)), expected[16:37, 32:96])


def test_a_tensor_of_many_chunks(tmp_path, open_gguf):
    shape = (3000, 288)
    data = encoded(Kind.Q4_1, shape)

    source = open_gguf(write(tmp_path / "model.gguf", {"token_embd.weight": (Kind.Q4_1, data)}))

    expected = torch.from_numpy(gguf_dequantize(data, Kind.Q4_1).reshape(shape))
    assert torch.equal(read(source, "model.embed_tokens.weight", shape), expected)


def test_rows_of_llama_queries_and_keys_are_put_back(tmp_path, open_gguf):
    heads, head_dim, columns = 3, 8, 64
    rows = heads * head_dim
    original = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    # as llama.cpp's converter stores them: row i of a head's first half beside row i of its second half
    stored = np.stack((original.reshape(heads, 2, 4, columns)[:, 0], original.reshape(heads, 2, 4, columns)[:, 1]), axis=2)
    stored = np.ascontiguousarray(stored.reshape(rows, columns))
    bias = np.ascontiguousarray(stored[:, 0])
    tensors = {f"blk.0.attn_{name}.weight": (Kind.F32, stored) for name in ("q", "k", "v")}
    tensors["blk.0.attn_q.bias"] = (Kind.F32, bias)

    llama = open_gguf(write(tmp_path / "llama.gguf", tensors, "llama"), head_dim=head_dim)
    qwen = open_gguf(write(tmp_path / "qwen.gguf", tensors, "qwen2"), head_dim=head_dim)

    prefix, shape = "model.layers.0.self_attn.", (rows, columns)
    whole = torch.from_numpy(original)
    assert torch.equal(read(llama, f"{prefix}q_proj.weight", shape), whole)
    assert torch.equal(read(llama, f"{prefix}k_proj.weight", shape, rows=(8, 24)), whole[8:24])
    assert torch.equal(read(llama, f"{prefix}q_proj.bias", (rows,), rows=(8, 16)), whole[8:16, 0])
    assert torch.equal(read(llama, f"{prefix}v_proj.weight", shape), torch.from_numpy(stored))
    assert torch.equal(read(qwen, f"{prefix}q_proj.weight", shape), torch.from_numpy(stored))


def test_threads_that_start_later_still_get_all_of_torchs_threads(tmp_path):
    threads = torch.get_num_threads()
    path = write(tmp_path / "model.gguf", {"token_embd.weight": (Kind.F16, encoded(Kind.F16))})
    source = GGUFSource((path,), head_dim=16)
    read(source, "model.embed_tokens.weight", SHAPE)
    source.close()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == threads == torch.get_num_threads()


def gguf_of(reference, path, architecture: str, matrices: Kind = Kind.F32) -> str:
    """A transformers model's weights as llama.cpp's converter stores them: layers' matrices in a type, others in float32."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    head_dim = getattr(reference.config, "head_dim", 8)
    tensors = {}
    for name, weight in reference.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        if stem == "lm_head" and reference.config.tie_word_embeddings:
            continue
        data = weight.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            data = data.reshape(-1, 2, head_dim // 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{names[rest]}"
        else:
            stem = names[stem]
        target = matrices if stem.startswith("blk.") and data.ndim == 2 else Kind.F32
        tensors[f"{stem}.{kind}"] = (target, gguf_quantize(np.ascontiguousarray(data), target))
    return write(path, tensors, architecture)


@pytest.mark.feature("Models", "GGUF, with weights of 4 to 32 bits")
@pytest.mark.parametrize(
    ("architecture", "settings", "gguf_name"),
    [
        ("LlamaForCausalLM", {}, "llama"),
        ("LlamaForCausalLM", {"tie_word_embeddings": True}, "llama"),
        ("Qwen2ForCausalLM", {}, "qwen2"),
        ("Qwen3ForCausalLM", {"head_dim": 16}, "qwen3"),
    ],
)
def test_a_model_from_gguf_equals_transformers(architecture, settings, gguf_name, tmp_path):
    reference = toy.hf_model(architecture, **settings)
    prompt = list(range(3, 40))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    path = gguf_of(reference, tmp_path / "model.gguf", gguf_name)
    config = toy.SIZES | settings | {"architectures": [architecture], "sliding_window": None}

    model = toy.load(toy.worker_config((path,), config, format="gguf"))

    torch.testing.assert_close(toy.Session(model, 96).run(prompt), expected, atol=1e-4, rtol=0)


def test_a16w4_keeps_codes_of_4_bits_in_float32_too(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
    path = gguf_of(toy.hf_model("LlamaForCausalLM", **sizes), tmp_path / "model.gguf", "llama", Kind.Q4_1)
    config = toy.SIZES | sizes | {"architectures": ["LlamaForCausalLM"]}
    configs = (toy.worker_config((path,), config, format="gguf", quant_type=quant_type) for quant_type in (None, "a16w4"))
    plain, a16w4 = (toy.Session(toy.load(config), 96).run(list(range(3, 40))) for config in configs)

    assert (a16w4 - plain).norm() < 1e-5 * plain.norm()  # 0.57 of it where rounded to 4 bits anew


def test_rope_factors_in_the_file_scale_as_llama3_does(tmp_path):
    """llama.cpp's converter turns Llama 3's scaling into a tensor of divisors, and says nothing of it in the metadata."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    }
    reference = toy.hf_model("LlamaForCausalLM", rope_parameters=scaling)
    prompt = list(range(3, 60))
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    plain = toy.SIZES | {"architectures": ["LlamaForCausalLM"]}
    scaled = ModelConfig.from_hf(plain | {"rope_parameters": scaling}).rope
    factors = inverse_frequencies(ModelConfig.from_hf(plain).rope, 96) / inverse_frequencies(scaled, 96)
    assert factors.max() > 2
    weights = gguf_of(reference, tmp_path / "weights.gguf", "llama")
    extra = write(tmp_path / "factors.gguf", {"rope_freqs.weight": (Kind.F32, factors.numpy())}, "llama")

    model = toy.load(toy.worker_config((weights, extra), plain, format="gguf"))

    torch.testing.assert_close(toy.Session(model, 96).run(prompt), expected, atol=1e-4, rtol=0)


def test_a_damaged_file_is_refused_at_any_length(tmp_path):
    write(tmp_path / "model.gguf", {"token_embd.weight": (Kind.F16, encoded(Kind.F16))})
    whole = (tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 20, *range(24, len(whole) - 1, 997)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UnsupportedModel, match=r"cut\.gguf is (cut short: fetch it again|not a GGUF file)"):
            GGUFSource((str(cut),), head_dim=16)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGML" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "is big-endian"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "is of version 1"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 40, "damaged"),
    ],
)
def test_other_files_are_refused(header, message, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(header)

    with pytest.raises(UnsupportedModel, match=message):
        GGUFSource((str(path),), head_dim=16)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFound, match="No such file"):
        GGUFSource((str(tmp_path / "none.gguf"),), head_dim=16)


@pytest.mark.feature("Models", "GGUF, with weights of 4 to 32 bits")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_stand_for_what_the_file_holds(kind, tmp_path, open_gguf):
    data = encoded(kind)
    expected = torch.from_numpy(gguf_dequantize(data, kind).reshape(SHAPE).copy())
    source = open_gguf(write(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": (kind, data)}))
    name = "model.layers.0.mlp.up_proj.weight"

    bits = source.code_bits(name)

    assert bits == {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 8, "Q5_1": 8, "Q5_K": 8, "Q6_K": 8, "Q8_0": 8}.get(kind.name)
    if bits is None:
        return
    codes = source.read_codes(Part(name, SHAPE))
    assert codes.bits == bits
    assert codes.group_size == source.group_size(name)
    assert torch.equal(codes.dequantize(), expected)
    share = source.read_codes(Part(name, SHAPE, rows=(16, 37), columns=(32, 96)))
    assert torch.equal(share.dequantize(), expected[16:37, 32:96])
    with pytest.raises(UnsupportedModel, match="which a share of 40 inputs cuts"):
        source.read_codes(Part(name, SHAPE, columns=(0, 40)))


def test_codes_of_llama_queries_are_put_back_like_their_values(tmp_path, open_gguf):
    heads, head_dim = 3, 8
    shape = (heads * head_dim, 64)
    data = encoded(Kind.Q4_1, shape)
    source = open_gguf(write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": (Kind.Q4_1, data)}, "llama"), head_dim=head_dim)
    name = "model.layers.0.self_attn.q_proj.weight"

    assert torch.equal(source.read_codes(Part(name, shape)).dequantize(), read(source, name, shape))


def test_a_bias_that_the_config_does_not_account_for_is_named(tmp_path, open_gguf):
    path = write(tmp_path / "x.gguf", {"blk.0.attn_q.bias": (Kind.F32, np.zeros(32, np.float32))})
    reader = WeightReader(open_gguf(path), dtype=torch.float32, device=torch.device("cpu"), report=lambda *_: None)

    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias, which the model's config does not account for"):
        reader.finish(1)


@pytest.mark.parametrize(
    ("kind", "cpu", "gpu"), [(Kind.Q4_K, 5, 6), (Kind.Q8_0, 10, 9), (Kind.Q6_K, 10, 10), (Kind.F16, 16, 16)]
)
def test_bits_that_layers_keep(kind, cpu, gpu, tmp_path, open_gguf):
    data = encoded(kind, (4, 256)) if kind is not Kind.F16 else np.zeros((4, 256), np.float16)
    source = open_gguf(write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": (kind, data)}))

    assert (source.bits_per_weight(on_cpu=True), source.bits_per_weight(on_cpu=False)) == (cpu, gpu)


def test_bits_of_layers_that_keep_some_of_the_codes(tmp_path, open_gguf):
    tensors = {
        "blk.0.ffn_up.weight": (Kind.Q4_1, encoded(Kind.Q4_1)),
        "blk.0.ffn_gate.weight": (Kind.Q6_K, encoded(Kind.Q6_K)),
    }
    source = open_gguf(write(tmp_path / "model.gguf", tensors))

    assert source.bits_per_weight(on_cpu=True) == (5 + 10) / 2
    assert source.bits_per_weight(on_cpu=True, kept=4, others=4.25) == (5 + 4.25) / 2
