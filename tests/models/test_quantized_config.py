"""What config.json says of quantised weights, in each library's words."""

import subprocess
import sys

import pytest

from dashinfer.errors import UnsupportedModel
from dashinfer.models.quantized_config import (
    AWQConfig,
    GPTQConfig,
    GPTQSettings,
    check_quant_type,
    read_quantization,
)
from dashinfer.models.scaled_config import ScaledConfig, ScaledWeights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(weights, activations=None, **settings):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    } | settings


def test_none():
    assert read_quantization(None) is None


def test_gptq():
    plain = read_quantization(GPTQ)
    second = read_quantization(GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1, "sym": False, "bits": 3})

    assert plain == GPTQConfig(settings=GPTQSettings(bits=4, group_size=128, symmetric=True), zeros_less_one=True)
    assert second == GPTQConfig(settings=GPTQSettings(bits=3, group_size=None, symmetric=False), zeros_less_one=False)
    assert (plain.modes, second.modes) == (("gptq", "a16w4"), ("gptq",))


def test_gptq_of_modules():
    config = read_quantization(
        GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 8}, ".*gate": {"group_size": -1, "sym": False}, "-:.*[13].*": {}}}
    )

    assert config.of("model.layers.0.mlp.up_proj").bits == 8
    assert config.of("model.layers.0.mlp.gate_proj") == GPTQSettings(bits=4, group_size=None, symmetric=False)
    assert config.of("model.layers.0.mlp.down_proj") == config.settings
    assert config.of("model.layers.1.mlp.up_proj") is None


@pytest.mark.parametrize(
    ("quantizer", "misplaced"),
    [(["gptqmodel:5.8.0"], True), (["gptqmodel:7.0.0"], False), (["optimum:1"], False), (None, False)],
)
def test_who_wrote_a_gptq_checkpoint(quantizer, misplaced):
    assert read_quantization(GPTQ | {"meta": {"quantizer": quantizer}}).zeros_misplaced is misplaced


def test_awq():
    assert read_quantization(AWQ) == AWQConfig(group_size=128)
    old = {"quant_method": "awq", "zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert read_quantization(old) == AWQConfig(group_size=64)


def test_compressed_tensors():
    packed = read_quantization(compressed(INT4))
    integers = read_quantization(compressed(INT8, TOKENS, format="int-quantized"))
    floats = read_quantization(compressed(FLOAT8, TOKENS | {"type": "float"}, format="float-quantized"))
    static = read_quantization(
        compressed(
            FLOAT8 | {"strategy": "tensor"}, {"num_bits": 8, "type": "float", "dynamic": False}, format="naive-quantized"
        )
    )

    assert packed.of("model.layers.0.mlp.up_proj") == ScaledWeights(bits=4, scale="group", group_size=128)
    assert packed.of("lm_head") is None
    assert (packed.modes, packed.activations) == (("a16w4",), None)
    assert (integers.modes, integers.activations) == (("a8w8",), "int8")
    assert (floats.modes, floats.activations) == (("fp8",), "fp8")
    assert static.of("x") == ScaledWeights(bits=None, scale="tensor")
    assert (static.modes, static.activations) == (("fp8",), "fp8")


def test_names_of_modules():
    table = compressed(INT4, ignore=["re:.*mlp.*", "model.layers.1.self_attn.q_proj"])
    group = table["config_groups"]["group_0"]
    table["config_groups"] = {
        "a": group | {"targets": ["re:.*layers.0.*"]},
        "b": group | {"targets": ["Linear"], "weights": INT8},
    }
    config = read_quantization(table)

    assert config.of("model.layers.0.self_attn.q_proj").bits == 4
    assert config.of("model.layers.1.self_attn.k_proj").bits == 8
    assert config.of("model.layers.1.self_attn.q_proj") is None
    assert config.of("model.layers.0.mlp.up_proj") is None
    assert config.modes == ()


def test_float8():
    config = read_quantization(FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]})

    assert isinstance(config, ScaledConfig)
    assert config.of("model.layers.1.mlp.up_proj") == ScaledWeights(bits=None, scale="block", group_size=128, block_rows=128)
    assert config.of("model.layers.0.mlp.up_proj") is None
    assert config.modes == ("fp8",)
    tensors = read_quantization({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]})
    assert tensors.of("x") == ScaledWeights(bits=None, scale="tensor")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantised with bitsandbytes are not supported; supported are",
        ),
        ({"quant_method": "hqq"}, "quantised with hqq"),
        ({"bits": 4}, "quantised with an unnamed method"),
        ("int8", "quantization_config is 'int8', not a table"),
        (GPTQ | {"bits": 5}, "GPTQ in 5 bits are not supported; supported: 2, 3, 4 and 8"),
        (GPTQ | {"bits": None}, "GPTQ in None bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "format 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "format 'marlin'"),
        (GPTQ | {"group_size": 0}, "group_size of quantization_config is 0"),
        (GPTQ | {"group_size": "128"}, "group_size of quantization_config is '128'"),
        (GPTQ | {"pack_dtype": "int8"}, "packed into 'int8'"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 6}}}, "GPTQ in 6 bits"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "pattern '\\('"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"bits": 3}, "AWQ in 3 bits"),
        (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (compressed(INT4, format="marlin-24"), "format 'marlin-24'"),
        (compressed(INT4, format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(INT4 | {"num_bits": 3}), "weights of 3-bit 'int' numbers"),
        (compressed(FLOAT8 | {"num_bits": 4}), "weights of 4-bit 'float' numbers"),
        (compressed(INT4 | {"strategy": "tensor_group"}), "scales by 'tensor_group'"),
        (compressed(INT4, TOKENS), "8-bit 'int' numbers with such weights"),
        (compressed(INT8, TOKENS | {"symmetric": False}), "or with zero points"),
        (compressed(INT8, TOKENS | {"num_bits": 4}), "activations of 4-bit"),
        (compressed(INT4, transform_config={"config_groups": {}}), "transform_config"),
        (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(INT4, config_groups={}), "has no config_groups"),
        (compressed(INT4, config_groups={"a": {"targets": ["Linear"]}}), "does not say what weights are"),
        (compressed(INT4, ignore=["re:["]), "pattern '\\['"),
        (compressed(INT4, ignore="lm_head"), "ignore of quantization_config is 'lm_head', not a list"),
        (FP8 | {"weight_block_size": [64, 64]}, r"blocks of \[64, 64\]"),
        (FP8 | {"fmt": "e5m2"}, "format 'e5m2'"),
        (FP8 | {"activation_scheme": "none"}, "activation_scheme 'none'"),
    ],
)
def test_what_is_refused(table, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read_quantization(table)

    assert "\n" not in str(caught.value)


def test_layers_with_different_activations_are_refused():
    table = compressed(INT8, TOKENS)
    group = table["config_groups"]["group_0"]
    table["config_groups"] = {"a": group, "b": group | {"input_activations": None}}

    with pytest.raises(UnsupportedModel, match="in some layers only"):
        read_quantization(table)


def test_quant_type_of_what_is_not_quantised():
    for quant_type in (None, "a16w4", "fp8"):
        check_quant_type(None, "some/model", quant_type, regroup=True)
    with pytest.raises(UnsupportedModel, match="--quant-type gptq: some/model is not a GPTQ checkpoint"):
        check_quant_type(None, "some/model", "gptq")


def test_quant_type_of_what_is_quantised():
    config = read_quantization(GPTQ)
    for quant_type in (None, "gptq", "a16w4"):
        check_quant_type(config, "some/model", quant_type)
    with pytest.raises(UnsupportedModel) as caught:
        check_quant_type(config, "some/model", "fp8")
    assert str(caught.value) == "--quant-type fp8: some/model is quantised already (GPTQ in 4 bits); leave out --quant-type"


def test_no_torch_is_needed():
    code = "import sys; from dashinfer.models import quantized_config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
