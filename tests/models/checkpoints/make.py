"""Makes the checkpoints beside this file: tiny random models, quantised and saved by the libraries that the formats are from.

    python tests/models/checkpoints/make.py [NAME...]

needs gptqmodel, compressed-tensors, torch, transformers and their dependencies; no GPU. (Made with gptqmodel 5.8.0,
compressed-tensors 0.20.0 and transformers 5.23.0.) What a library's own unpacking makes of the weights it saved, run by
transformers in float32, is written beside: `expected.safetensors` has `prompt` [length], `tokens` [NEW_TOKENS], the greedy
continuation, and `logits` [length, vocab] of the prompt. Prompts are chosen so that no token of the continuation is decided by
a hair. Where a checkpoint has inputs of layers rounded, too, they are here, row by row, with scales of 1/127 or 1/448 of the
greatest one; `own` [length, vocab] are the logits of compressed-tensors' own forward pass, which has scales of 1/127.5 for
integers, and static ones where the checkpoint has.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent.absolute()
VOCAB, PROMPT, NEW_TOKENS, PROMPTS = 128, 12, 32, 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA, QWEN2, QWEN3 = {"model_type": "llama"}, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 32}
# AWQ searches in whole blocks of 64 outputs
EVEN = QWEN2 | {"intermediate_size": 128, "num_key_value_heads": 4}
# whole blocks of 128 by 128
BLOCKS = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 1}


def original(settings: dict[str, Any], folder: Path) -> None:
    """A random model of 16 bits, with a tokeniser, which gptqmodel asks for."""
    settings = SIZES | settings
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1 if "norm" in name else 0, 0.1 if weight.ndim == 1 else 1.6 * weight.shape[1] ** -0.5)
    model.half().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB)}, unk_token="t0"))
    special = {"bos_token": "t0", "eos_token": "t1", "pad_token": "t2", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def gptq(out: Path, shape: dict[str, Any], *, method: str = "gptq", format: str = "gptq", **settings: Any) -> nn.Module:
    """Quantised by gptqmodel; its module for CPUs unpacks."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import gemm_awq

    with tempfile.TemporaryDirectory() as folder:
        original(shape, Path(folder))
        config = QuantizeConfig(quant_method=method, format=format, offload_to_disk=False, device="cpu", **settings)
        model = GPTQModel.load(folder, config, dtype=torch.float16)
        generator = torch.Generator().manual_seed(1)
        texts = [torch.randint(3, VOCAB, (64,), generator=generator).tolist() for _ in range(48)]
        gemm_awq.awq_ext = object()  # packing asks for the kernels, and calls none
        model.quantize(texts, batch_size=4)
        model.save(str(out))
    backend = BACKEND.TORCH_AWQ if method == "awq" else BACKEND.TORCH
    loaded = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16).model
    return plain(out, {name: unpacked(module) for name, module in loaded.named_modules() if hasattr(module, "qweight")})


def unpacked(module: nn.Module) -> Tensor:
    """[outputs, inputs], with scales in float32: what the library computes before it rounds to 16 bits."""
    from gptqmodel.nn_modules.qlinear import PackableQuantLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    module.scales = module.scales.float()
    if isinstance(module, PackableQuantLinear):
        return PackableQuantLinear.dequantize_weight(module).T
    return dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size).T


def plain(out: Path, weights: dict[str, Tensor]) -> nn.Module:
    """transformers' model of the files' other tensors and these weights, in float32."""
    config = AutoConfig.from_pretrained(out)
    del config.quantization_config
    stored = load_file(out / "model.safetensors")
    state = {name: tensor.float() for name, tensor in stored.items() if name.endswith((".weight", ".bias"))}
    state |= {f"{name}.weight": weight for name, weight in weights.items()}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return model


def compressed(
    out: Path, shape: dict[str, Any], weights: dict[str, Any], activations: dict[str, Any] | None = None, **settings: Any
) -> nn.Module:
    """Rounded and saved by compressed-tensors; its own forward pass, which rounds activations too, after it unpacked."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    with tempfile.TemporaryDirectory() as folder:
        original(shape, Path(folder))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    peaks = static_scales(model)
    group = {"targets": settings.pop("targets", ["Linear"]), "weights": weights, "input_activations": activations}
    ignore = settings.pop("ignore", ["lm_head"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": group}, ignore=ignore))
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        found = ranges(module.weight.detach(), scheme.weights)
        scale, zero = calculate_qparams(*found, scheme.weights)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if not scheme.weights.symmetric:
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(peaks[name] / 448)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, **settings)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    weights = decompressed(out, model)
    reference = plain(out, weights)
    if activations is None:
        return reference
    reference.own = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return round_inputs(reference, weights, activations["type"])


def static_scales(model: nn.Module) -> dict[str, float]:
    """The greatest input of each linear layer, over some random tokens."""
    peaks: dict[str, float] = {}

    def watch(name: str) -> Any:
        return lambda _, args: peaks.update({name: max(peaks.get(name, 0.0), args[0].abs().max().item())})

    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears]
    with torch.inference_mode():
        model(input_ids=torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(3)))
    for hook in hooks:
        hook.remove()
    return peaks


def round_inputs(model: nn.Module, names: Iterable[str], kind: str) -> nn.Module:
    """The model with each row of these layers' inputs rounded."""

    def rounded(x: Tensor) -> Tensor:
        scales = x.abs().amax(-1, keepdim=True) / (127.0 if kind == "int" else 448.0)
        scaled = x / scales
        return (scaled.round() if kind == "int" else scaled.to(torch.float8_e4m3fn).float()) * scales

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    return model


def decompressed(out: Path, model: nn.Module) -> dict[str, Tensor]:
    """What the library unpacks of the files, with scales in float32."""
    from compressed_tensors.compressors import BaseCompressor

    stored = load_file(out / "model.safetensors")
    weights = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        state = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        state["weight_scale"] = state["weight_scale"].float()
        weights[name] = BaseCompressor.load_from_registry(scheme.format).decompress(state, scheme)["weight"]
    return weights


def ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """The least and greatest weights of what shares a scale."""
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    size = args.group_size if args.strategy == "group" else weight.shape[1]
    groups = weight.view(weight.shape[0], -1, size)
    return groups.amin(-1), groups.amax(-1)


def fp8(out: Path, shape: dict[str, Any], block: tuple[int, int] | None) -> nn.Module:
    """Rounded and unpacked by what transformers does when it saves and loads such models."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    with tempfile.TemporaryDirectory() as folder:
        original(shape, Path(folder))
        weights = load_file(Path(folder) / "model.safetensors")
        settings = FineGrainedFP8Config(weight_block_size=block, modules_to_not_convert=["lm_head"])
        quantizer = FineGrainedFP8HfQuantizer(settings)
        stored: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if not re.search(r"_proj\.weight$", name):
                stored[name] = weight.bfloat16()
                continue
            pair = Fp8Quantize(quantizer).convert({name: weight})
            if block is None:  # one scale, which files keep without dimensions
                pair = {key: value.view(()) if value.numel() == 1 else value for key, value in pair.items()}
            stored |= pair
            scale = pair[name + "_scale_inv"]
            dense[name.removesuffix(".weight")] = Fp8Dequantize(quantizer)._dequantize_one(pair[name], scale, torch.float32)
        config = json.loads((Path(folder) / "config.json").read_text())
    out.mkdir()
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = settings.to_dict()
    (out / "config.json").write_text(json.dumps(config))
    return round_inputs(plain(out, dense), dense, "float")


TOKEN_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
TOKEN_FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MIXED = {
    r"+:.*\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
    r"+:.*\.layers\.1\.self_attn\.[qkv]_proj$": {"bits": 2, "group_size": 16},
    r"-:.*\.layers\.0\.self_attn\.o_proj$": {},
}

CASES: dict[str, Callable[[Path], nn.Module]] = {
    "gptq-4bit-act-order": lambda out: gptq(out, LLAMA, bits=4, group_size=32, desc_act=True, sym=True),
    "gptq-4bit-asymmetric": lambda out: gptq(out, QWEN2, bits=4, group_size=64, desc_act=False, sym=False),
    "gptq-3bit-v2": lambda out: gptq(out, QWEN2, bits=3, group_size=32, desc_act=True, sym=False, format="gptq_v2"),
    "gptq-3bit": lambda out: gptq(out, LLAMA, bits=3, group_size=32, desc_act=False, sym=False),
    "gptq-2bit": lambda out: gptq(out, LLAMA, bits=2, group_size=16, desc_act=False, sym=False),
    "gptq-8bit-rows": lambda out: gptq(out, QWEN3, bits=8, group_size=-1, desc_act=True, sym=True),
    "gptq-mixed": lambda out: gptq(out, LLAMA, bits=4, group_size=32, desc_act=False, sym=False, dynamic=MIXED, lm_head=True),
    "awq": lambda out: gptq(out, EVEN, method="awq", format="gemm", bits=4, group_size=32, sym=False),
    "packed-4bit": lambda out: compressed(
        out, LLAMA, {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    ),
    "packed-4bit-asymmetric": lambda out: compressed(
        out,
        QWEN2,
        {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
        ignore=["lm_head", r"re:.*layers\.1\.mlp\..*"],
    ),
    "packed-8bit": lambda out: compressed(out, QWEN3, {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8": lambda out: compressed(out, LLAMA, {"num_bits": 8, "type": "int", "strategy": "channel"}, TOKEN_INT8),
    "float8-rows": lambda out: compressed(out, QWEN2, {"num_bits": 8, "type": "float", "strategy": "channel"}, TOKEN_FLOAT8),
    "float8-static": lambda out: compressed(
        out,
        LLAMA,
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        targets=[r"re:.*_proj$"],
    ),
    "float8-weights": lambda out: compressed(
        out, QWEN3, {"num_bits": 8, "type": "float", "strategy": "channel"}, quantization_format="naive-quantized"
    ),
    "fp8-blocks": lambda out: fp8(out, BLOCKS, (128, 128)),
    "fp8-tensors": lambda out: fp8(out, QWEN2, None),
}  # fmt: skip


@torch.inference_mode()
def expected(model: nn.Module) -> dict[str, Tensor]:
    """Of many prompts the one whose closest decision is the clearest."""
    prompts = torch.randint(3, VOCAB, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(2))
    rows, margins = prompts, []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=rows, use_cache=False).logits[:, -1].float()
        best = logits.topk(2).values
        margins.append((best[:, 0] - best[:, 1]) / logits.std(-1))
        rows = torch.cat((rows, logits.argmax(-1, keepdim=True)), 1)
    worst = torch.stack(margins).amin(0)
    varied = torch.tensor([len(set(row.tolist())) for row in rows[:, PROMPT:]])
    chosen = int(worst.where(varied >= min(16, int(varied.max())), 0.0).argmax())
    distinct = int(varied[chosen])
    print(f"  closest decision: {worst[chosen]:.3f} standard deviations of the logits; {distinct} different tokens")
    found = {
        "prompt": prompts[chosen].clone(),
        "tokens": rows[chosen, PROMPT:].clone(),
        "logits": model(input_ids=prompts[chosen : chosen + 1], use_cache=False).logits[0].float(),
    }
    if (own := getattr(model, "own", None)) is not None:
        found["own"] = own(input_ids=prompts[chosen : chosen + 1], use_cache=False).logits[0].float()
        print(f"  own forward pass: {(found['own'] - found['logits']).norm() / found['logits'].norm():.4f} away")
    return found


def make(name: str) -> None:
    out = FOLDER / name
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        model = CASES[name](made)
        found = expected(model)
        out.mkdir()
        for kept in ("config.json", "model.safetensors"):
            shutil.copy(made / kept, out / kept)
    save_file(found, out / "expected.safetensors")
    print(f"{name}: {sum(path.stat().st_size for path in out.iterdir()) / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # gptqmodel leaves its logs where it runs
        for name in sys.argv[1:] or CASES:
            make(name)
