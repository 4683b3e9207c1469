"""The decoder of Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and of the Qwen models that see: one body, since they differ by
flags only.

Tokens of all sequences lie one after the other, [tokens, hidden]; which token belongs where is the `PagedBatch`'s business.
Knows nothing of sampling, scheduling or files. Every layer ends in the residual sum that the next one's norm begins with, so
the two are one op. The residual stream is float32 whatever the layers compute in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.models.gguf import ROPE_FACTORS
from dashinfer.models.kv_cache import KVCache
from dashinfer.models.parallel import (
    GateUpLinear,
    Group,
    QKVLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    load_vocab_share,
    share_heads,
)
from dashinfer.models.rope import rope_table
from dashinfer.models.rotation import Rotation
from dashinfer.models.shapes import ALL, EMBEDDING, FINAL_NORM, HEAD
from dashinfer.models.stage import Stage
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import (
    DecodeLayers,
    LayerParts,
    PagedBatch,
    QuantizedRows,
    add_rms_norm,
    can_decode,
    gelu_mul,
    paged_attention,
    rms_norm,
    rope_kv_write,
    silu_mul,
)


@dataclass(frozen=True)
class InputEmbeddings:
    """What takes the place of placeholder tokens in a step.

    Attributes:
        rows: [count] int64, which of the step's tokens; none twice.
        values: [count, hidden].
        deepstack: [count, hidden] each, what is added to those rows after each of the first layers.
    """

    rows: Tensor
    values: Tensor
    deepstack: tuple[Tensor, ...] = ()


def _rotates(reader: WeightReader) -> bool:
    return reader.format is not None and reader.format.rotates


class DecoderLayer:
    """Attention and a gated MLP, each after a norm and with a residual connection around it."""

    def __init__(self, config: ModelConfig, index: int, reader: WeightReader, group: Group, max_length: int) -> None:
        prefix = f"model.layers.{index}."
        hidden, head_dim = config.hidden_size, config.head_dim

        def norm(name: str, size: int) -> Tensor:
            return reader.read(Part(f"{prefix}{name}.weight", (size,)), dtype=torch.float32)

        def stream_norm(name: str) -> Tensor:
            weight = norm(name, hidden)
            return torch.ones_like(weight) if _rotates(reader) else weight

        self.input_norm = stream_norm("input_layernorm")
        self.qkv = QKVLinear.load(
            reader,
            f"{prefix}self_attn.",
            hidden,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            bias=config.qkv_bias,
            group=group,
        )
        share = share_heads(config.num_heads, config.num_kv_heads, group.rank, group.world_size)
        self.output = RowParallelLinear.load(
            reader,
            f"{prefix}self_attn.o_proj.",
            config.num_heads * head_dim,
            hidden,
            bias=config.output_bias,
            group=group,
            share=(share.start * head_dim, share.stop * head_dim),
        )
        self.mlp_norm = stream_norm("post_attention_layernorm")
        self.gate_up = GateUpLinear.load(
            reader, f"{prefix}mlp.", hidden, config.intermediate_size, bias=config.mlp_bias, group=group
        )
        self.down = RowParallelLinear.load(
            reader, f"{prefix}mlp.down_proj.", config.intermediate_size, hidden, bias=config.mlp_bias, group=group
        )
        self.heads = {"num_heads": share.num_heads, "num_kv_heads": share.num_kv_heads, "head_dim": head_dim}
        if config.qk_norm:
            self.heads |= {"q_norm": norm("self_attn.q_norm", head_dim), "k_norm": norm("self_attn.k_norm", head_dim)}
        self.heads["eps"] = self.eps = config.norm_eps
        if config.rope.mrope_section is not None:
            self.heads |= {"mrope_section": config.rope.mrope_section, "mrope_interleaved": config.rope.mrope_interleaved}
        self.scale = head_dim**-0.5
        window = config.windows[index]
        self.window = window if window is not None and window < max_length else None
        self.activate = silu_mul if config.activation == "silu" else gelu_mul

    def __call__(
        self,
        normed: Tensor | QuantizedRows,
        residual: Tensor,
        batch: PagedBatch,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: KVCache,
    ) -> Tensor:
        """The MLP's output, which the caller adds to `residual`; the attention's is added here.

        Args:
            normed: [tokens, hidden], the input after `input_norm`; quantised where `qkv` takes it so.
            residual: [tokens, hidden] float32, the input before it; changed in place.
            positions: [tokens] int64, or [3, tokens], that queries and keys are rotated by.
        """
        held, scales = kv_cache.values, kv_cache.scales
        q = rope_kv_write(self.qkv(normed), positions, cos_sin, held, batch.slot_mapping, **self.heads, kv_scales=scales)
        attended = paged_attention(q, held, batch, scale=self.scale, window=self.window, kv_scales=scales)
        output = self.output(attended)
        normed = add_rms_norm(output, residual, self.mlp_norm, self.eps, attended.dtype, quantize=self.gate_up.takes)
        return self.down(self.activate(self.gate_up(normed), quantize=self.down.takes))

    @property
    def nbytes(self) -> int:
        tensors = [self.input_norm, self.mlp_norm, *(self.heads[name] for name in ("q_norm", "k_norm") if name in self.heads)]
        return sum(part.nbytes for part in (self.qkv, self.output, self.gate_up, self.down, *tensors))


class DecoderLM:
    """A causal language model, loaded: one rank's share of one stage of it.

    Attributes:
        config: of the whole model.
        group: the ranks that hold the rest of the stage.
        stage: which layers it has. An embedding is at the first, and at the last that has it for a head, too; the final norm
            and the head are at the last.
        weight_bytes: that this rank holds.
        rotation: of the residual stream between the embedding and the final norm; None: there is none.
    """

    def __init__(self, config: ModelConfig, reader: WeightReader, group: Group, max_length: int, stage: Stage = ALL) -> None:
        """Reads the weights. `max_length` in tokens bounds the positions that `forward` takes."""
        self.config, self.group, self.stage = config, group, stage
        self._dtype = reader.dtype
        tied = config.tie_word_embeddings
        embedding = None
        if stage.first or (stage.last and tied):
            embedding = load_vocab_share(reader, EMBEDDING, config.vocab_size, config.hidden_size, group)
        self.embedding = None if embedding is None else VocabParallelEmbedding(embedding, group)
        layers = stage.layers(config.num_layers)
        self.layers = [DecoderLayer(config, index, reader, group, max_length) for index in layers]
        self.rotation = Rotation(config.hidden_size, reader.device) if _rotates(reader) else None
        self.final_norm = self.head = None
        if stage.last:
            self.final_norm = reader.read(Part(FINAL_NORM, (config.hidden_size,)), dtype=torch.float32)
            self.head = VocabParallelHead.load(
                reader,
                EMBEDDING if tied else HEAD,
                config.vocab_size,
                config.hidden_size,
                group,
                embedding=embedding if tied else None,
            )
        factors = None
        if ROPE_FACTORS in reader:
            factors = reader.read(Part(ROPE_FACTORS, (config.rope.rotary_dim // 2,)), dtype=torch.float32).cpu()
        self.cos_sin = rope_table(config.rope, max_length, factors).to(reader.device)
        reader.finish(config.num_layers)
        self._decode_layers = self._as_one()
        parts = (self.embedding, *self.layers, self.final_norm, self.cos_sin, self.head, self.rotation)
        self.weight_bytes = sum(part.nbytes for part in parts if part is not None)

    def _as_one(self) -> DecodeLayers | None:
        """What computes all layers of steps that it takes; None: nothing does."""
        first, whole = self.layers[0], self.group.world_size == 1 and self.stage.count == 1
        if self.final_norm is None or not whole or self.rotation is not None or self.config.qk_norm:
            return None
        layers = [
            LayerParts(
                input_norm=layer.input_norm,
                qkv=layer.qkv.linear,
                output=layer.output.linear,
                mlp_norm=layer.mlp_norm,
                gate_up=layer.gate_up.linear,
                down=layer.down.linear,
                window=layer.window,
            )
            for layer in self.layers
        ]
        if self.config.activation != "silu" or not can_decode(layers):
            return None
        sizes = {name: first.heads[name] for name in ("num_heads", "num_kv_heads", "head_dim", "eps")}
        return DecodeLayers(layers, self.final_norm, self.cos_sin, scale=first.scale, **sizes)

    @torch.inference_mode()
    def forward(
        self,
        inputs: Tensor,
        batch: PagedBatch,
        kv_caches: list[KVCache],
        *,
        positions: Tensor | None = None,
        images: InputEmbeddings | None = None,
    ) -> Tensor:
        """Runs the layers, and writes the new keys and values to the cache.

        Args:
            inputs: token ids, [tokens] int64; on stages after the first what the one before returned, which is changed in
                place.
            kv_caches: of each layer of the stage, as `allocate_kv_cache` makes them.
            positions: that tokens are rotated by, where they are not their places in the sequences: [tokens] int64, or
                [3, tokens] temporal, height and width positions; all below the `max_length` that the model was made for.
            images: embeddings of tokens that stand for what a vision tower saw.

        Returns:
            [tokens, hidden] after the final norm; on stages before the last float32, the residual stream.
        """
        if positions is None:
            positions = batch.positions
        residual = self._embed(inputs, images) if self.stage.first else inputs
        if self._decode_layers is not None and images is None:
            caches = [kv_cache.values for kv_cache in kv_caches]
            if self._decode_layers.takes(batch, positions, caches):
                return self._decode_layers(residual, batch, positions, caches)
        eps, dtype = self.config.norm_eps, self._dtype
        output = None
        for index, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            norm, quantize = layer.input_norm, layer.qkv.takes
            if output is None:
                normed = rms_norm(residual, norm, eps, dtype, quantize=quantize)
            else:
                normed = add_rms_norm(output, residual, norm, eps, dtype, quantize=quantize)
            output = layer(normed, residual, batch, positions, self.cos_sin, kv_cache)
            if images is not None and index < len(images.deepstack):
                added = images.deepstack[index].to(residual.dtype)
                residual.index_add_(0, images.rows, added if self.rotation is None else self.rotation(added))
        assert output is not None
        if self.final_norm is None:
            return residual.add_(output)
        if self.rotation is not None:
            return rms_norm(self.rotation(residual.add_(output)), self.final_norm, eps, dtype)
        return add_rms_norm(output, residual, self.final_norm, eps, dtype)

    def _embed(self, input_ids: Tensor, images: InputEmbeddings | None) -> Tensor:
        """[tokens] -> [tokens, hidden] float32, the residual stream before the first layer."""
        assert self.embedding is not None
        embedded = self.embedding(input_ids)
        if images is not None:
            embedded.index_copy_(0, images.rows, images.values.to(embedded.dtype))
        residual = embedded.to(torch.float32, copy=True)
        return residual if self.rotation is None else self.rotation(residual)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """[rows, hidden] of the last stage's `forward` -> [rows, vocab] float32 on rank 0 of the tensor-parallel group, None on
        the others."""
        assert self.head is not None
        return self.head(hidden)
