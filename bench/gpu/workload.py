"""What the engine and its peer are asked: the model's shape, batches and lengths; and what the answers' times come to."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

QWEN_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
TOY = QWEN_7B | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}

QWEN_2_VL_7B = QWEN_7B | {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
TOY_VL = (
    QWEN_2_VL_7B
    | {key: TOY[key] for key in TOY if key not in ("architectures", "model_type")}
    | {
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_start_token_id": 296,
        "vision_end_token_id": 297,
        "image_token_id": 298,
        "video_token_id": 299,
        "vision_config": QWEN_2_VL_7B["vision_config"] | {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    }
)


@dataclass(frozen=True)
class Workload:
    """Batches of prompts, each sent at once, greedy, answers of full length. Those that a mark is set for come first."""

    config: dict[str, Any]
    batches: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int

    def prompts(self, batch: int) -> list[list[int]]:
        """Random tokens, the same ones every time."""
        draw, vocab_size = random.Random(batch), self.config["vocab_size"]
        return [[draw.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(batch)]


def make_workload(*, toy: bool) -> Workload:
    return Workload(TOY, (1, 3), 20, 6) if toy else Workload(QWEN_7B, (256, 1, 64, 8), 1000, 200)


def client_figures(times: Sequence[Sequence[float]]) -> dict[str, float]:
    """TTFT and TPOT in milliseconds and output tokens/s.

    Args:
        times: for each sequence, seconds from the moment that all were sent to each of its tokens; at least two.
    """
    tpots = sorted((each[-1] - each[0]) / (len(each) - 1) for each in times)
    ttfts = sorted(each[0] for each in times)
    return {
        "ttft_p50_ms": statistics.median(ttfts) * 1e3,
        "ttft_max_ms": ttfts[-1] * 1e3,
        "tpot_p50_ms": statistics.median(tpots) * 1e3,
        "tpot_max_ms": tpots[-1] * 1e3,
        "tokens_per_second": sum(map(len, times)) / max(each[-1] for each in times),
    }
