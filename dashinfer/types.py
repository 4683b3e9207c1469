"""What crosses the boundary between the parent process and its workers: msgspec Structs, and nothing that needs torch.

A rank executes plans strictly in the order it receives them, so the parent may hand a block or a slot to another sequence in
the plan after the one that used it last. A *slot* is a row of a rank's preallocated per-sequence state, below `max_batch`; a
*block* is a page of the KV cache holding `block_size` tokens of every layer.
"""

from typing import Any, Literal

from msgspec import Struct

DataType = Literal["float16", "bfloat16", "float32"]
QuantType = Literal["gptq", "a8w8", "a16w4", "a16w8", "fp8"]
KVCacheDtype = Literal["auto", "int8", "fp8"]
VisionEngine = Literal["native", "transformers", "tensorrt"]
Grid = tuple[int, int, int]  # patches of an image or a video: steps in time, rows, columns
MAX_FRAME_BYTES = 256 * 1024 * 1024  # of one encoded message
PoolingType = Literal["mean", "last"]  # over a prompt's hidden states
FinishReason = Literal["stop", "length"]


class SamplingParams(Struct, frozen=True, omit_defaults=True):
    """How one sequence samples and when it ends.

    Logits become, in this order: biased, without stop tokens before `min_tokens`, penalised (repetition over prompt and output;
    presence and frequency over the output, as OpenAI defines them), divided by `temperature`, then cut by `top_k`, `top_p` and
    `min_p`. The draw depends on `seed` and the position of the token alone, never on the rest of the batch.
    """

    max_tokens: int
    seed: int  # always set: the parent draws one where the request has none
    temperature: float = 1.0  # 0, and what is too close to it to divide by, is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # includes the model's end-of-sequence ids unless the request ignores them
    logprobs: int | None = None  # None: off; k: the chosen token's and the k likeliest ones'
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, which are then all computed
    pooling: PoolingType | None = None  # the prompt's embedding comes with the first token, which is the only one


class ModelFiles(Struct, frozen=True):
    """Where a worker finds a model. `config` is a Hugging Face style config.json, made from the metadata for a GGUF file."""

    name: str
    format: Literal["safetensors", "gguf"]
    weights: tuple[str, ...]  # absolute paths; empty only with load_format "dummy"
    config: dict[str, Any]


class WorkerConfig(Struct, frozen=True):
    """Everything a rank is told before it loads. `None` means: find out."""

    rank: int
    world_size: int
    files: ModelFiles
    device: Literal["auto", "cuda", "cpu"]
    data_type: DataType
    load_format: Literal["auto", "dummy"]
    max_batch: int
    max_length: int | None  # tokens; None: 8192, or the model's own limit where that is shorter
    max_step_tokens: int | None  # token budget of one step
    block_size: int | None  # tokens a block
    kv_cache_memory: int | None  # bytes a rank
    log_level: str = "info"
    gpu_memory_utilization: float = 0.9  # of the device's memory, everything together
    enforce_eager: bool = False  # no CUDA graphs
    deterministic: bool = False  # results do not depend on what else is in the batch
    quant_type: QuantType | None = None  # None: as the checkpoint is
    quant_group_size: int | None = None  # inputs that share a scale in a16w4 and a16w8; None: the mode's own
    quantize_head: bool = False  # the output layer too
    kv_cache_dtype: KVCacheDtype = "auto"  # auto: `data_type`
    vision: bool = False  # load the checkpoint's vision tower too
    vision_engine: VisionEngine | None = None  # None: tensorrt where it works, else native
    pixel_values: bytes = b""  # [channels, 256] float32, what each byte of each channel of a patch stands for
    media_cache_memory: int | None = None  # bytes of embeddings that a rank keeps
    pipeline_parallel: int = 1  # stages of `world_size` / `pipeline_parallel` ranks each, whose numbers follow one another
    local_rank: int = 0  # among the ranks of this machine: which GPU, which cores
    local_size: int = 1  # ranks on this machine
    rendezvous: str = ""  # where the ranks meet, an `init_method` of torch.distributed; empty for a single rank
    interface: str = "lo"  # of the network, for what ranks tell each other
    num_blocks: int | None = None  # that the KV cache must have, when ranks start again


class Start(Struct, tag="start", frozen=True):
    """Parent to rank, first frame."""

    config: WorkerConfig


class Progress(Struct, tag="progress", frozen=True):
    """Rank to parent while loading."""

    stage: str  # "weights", "graphs"
    done: int
    total: int
    unit: str = ""  # "B" for bytes


class Ready(Struct, tag="ready", frozen=True):
    """Rank to parent when it can take plans."""

    architecture: str
    mode: Literal["llm", "vlm"]
    device: str  # "cpu", "NVIDIA H200"
    data_type: DataType
    vocab_size: int
    max_length: int  # tokens, resolved
    max_step_tokens: int
    block_size: int
    num_blocks: int
    weight_bytes: int
    kv_cache_bytes: int
    activation_bytes: int = 0  # kept free for a step's temporary tensors
    graph_bytes: int = 0  # of CUDA graphs
    kv_cache_dtype: KVCacheDtype = "auto"
    vision_engine: VisionEngine | None = None  # with mode "vlm"
    media_cache_bytes: int = 0  # for embeddings, see `Encode`
    media_token_bytes: int = 0  # that the embeddings of one token take there


class Failed(Struct, tag="failed", frozen=True):
    """Rank to parent: it cannot go on. `kind` names a class of `dashinfer.errors`; anything else becomes a WorkerError.

    `PeerLost` says that the cause is most likely another rank's end.
    """

    kind: str
    message: str
    traceback: str = ""


class Alive(Struct, tag="alive", frozen=True):
    """Rank to parent, once a second from a thread of its own."""


class OutOfMemory(Struct, tag="memory", frozen=True):
    """Rank to parent: memory ran out in a step, of which nothing counts. This plan and later ones are dropped until `Reset`.

    A group of one rank goes on so; in larger ones others wait in the midst of the step, and all ranks are started again.
    """

    step: int


class Reset(Struct, tag="reset", frozen=True):
    """Parent to rank, after `OutOfMemory`: every slot is empty, and plans count again."""


class Encode(Struct, tag="encode", frozen=True):
    """Parent to rank: run the vision tower over an image or a video, and keep the embeddings under `key`.

    Ranks do so between steps, and say `Encoded` when they have. The parent never asks for more than `media_cache_bytes` at a
    time, but for a single medium that is larger by itself. A plan that needs embeddings waits for them.
    """

    key: bytes  # stands for the content
    grid: Grid
    patches: bytes  # [patches, channels * temporal_patch_size * patch_size ** 2] uint8


class Forget(Struct, tag="forget", frozen=True):
    """Parent to rank: these embeddings are wanted no more, whether encoded or not; plans sent earlier still find them."""

    keys: list[bytes]


class Encoded(Struct, tag="encoded", frozen=True):
    """Rank to parent: these are there. Without any: encoding goes on."""

    keys: list[bytes]
    failed: list[bytes] = []  # there is not enough memory for these, even by themselves; the rank has given them up


class MediaSpan(Struct, frozen=True, array_like=True):
    """Positions of a prompt that take embeddings instead of tokens."""

    key: bytes
    start: int
    offset: int  # of the first one among the key's embeddings
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Enter(Struct, frozen=True, array_like=True):
    """A sequence takes a slot, for the first time or again after a preemption."""

    slot: int
    tokens: bytes  # int32 little endian: the prompt, then what was produced so far
    prompt_length: int
    sampling: SamplingParams
    media: tuple[MediaSpan, ...] = ()  # ascending
    positions: bytes = (
        b""  # int32 little endian [3, prompt_length], that the prompt is rotated by; empty: the places themselves
    )
    delta: int = 0  # what a token after the prompt adds to its place for its three positions


class Chunk(Struct, frozen=True, array_like=True):
    """One sequence's share of a step: positions [start, start + length) of its slot are computed.

    Their token ids are in the slot already, from `Enter` or written there by the rank itself when it sampled them, but for the
    last ones where `tokens` has them.
    """

    slot: int
    start: int
    length: int
    sample: bool  # sample the token at position start + length
    new_blocks: tuple[int, ...]  # appended to the slot's block table before the step; Enter empties the table
    tokens: bytes = b""  # int32 little endian: of the last positions, in place of what the slot has there


class StepPlan(Struct, tag="plan", frozen=True):
    """One forward pass. `chunks` with length 1 and `sample` come first.

    Numbers ascend. With M stages some are left out, so that what plan j samples in a slot, no plan before j + M uses that slot.
    """

    step: int
    enter: list[Enter]
    chunks: list[Chunk]
    masked: bool = False  # `Masks` of this step follow, for the rank that samples, which waits for them then


class Masks(Struct, tag="masks", frozen=True):
    """Parent to the rank that samples: what the chunks that sample in a step may sample. Comes once for each plan that says so,
    as soon as the results of the steps before it are applied, so while the step already runs."""

    step: int
    rows: tuple[int, ...]  # among the chunks that sample, in the plan's order; any other takes every token
    words: bytes  # int32 little endian [len(rows), ceil(vocab / 32)], a bit 1 for each token that is allowed, lowest first


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities before temperature and cuts."""

    chosen: float
    top_tokens: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class PromptLogprobs(Struct, frozen=True, array_like=True):
    """Of the tokens at positions start + 1, start + 2, ... of a prompt, where a chunk begins at start; as `TokenLogprobs`."""

    chosen: bytes  # float32 little endian [positions]
    count: int  # of the likeliest tokens
    top_tokens: bytes  # int32 little endian [positions, count]
    top_logprobs: bytes  # float32 little endian [positions, count]


class StepResult(Struct, tag="result", frozen=True):
    """What a step produced: one token for each chunk that sampled, in the plan's order."""

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # by index into `tokens`, for those that asked
    failed: list[int] = []  # indexes into `tokens` of those that mean nothing: the model gave no finite logits for them
    prompt_logprobs: dict[int, PromptLogprobs] = {}  # by index of the plan's chunk, for sequences that asked
    embeddings: dict[int, bytes] = {}  # float32 little endian [hidden], likewise


FromParent = Start | StepPlan | Masks | Encode | Forget | Reset
FromWorker = Progress | Ready | Failed | Alive | StepResult | OutOfMemory | Encoded
