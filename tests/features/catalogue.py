"""Every feature that tests may prove, with how it is asked for; tables have their rows in this order."""

from dataclasses import dataclass

TEXT = (r"^add_rms_norm-\d+$", r"^rope-128$", r"^decode-128(-amd)?$", r"^decode-(schedule|merge)", r"^prefill-128-.*-bf16-",
        r"^silu_mul-\d+$", r"^sampling-")  # fmt: skip
TOWER = (r"^varlen", r"^(add_)?layer_norm-", r"^rotate_heads-")
ROWS_TO_INT8 = (r"^quantize_rows-.*-i8", r"^add_rms_norm-.*-int8", r"^silu_mul-.*-int8")
ROWS_TO_FLOAT8 = (r"^quantize_rows-.*-fp8", r"^add_rms_norm-.*-float8", r"^silu_mul-.*-float8")
MASK = (r"^sampling-penalise$",)


@dataclass(frozen=True)
class Feature:
    """A row's cells. `kernels` are regular expressions for the names of the kernel variants that it needs on a GPU.

    None: it is the same whatever the device is; empty: it is not, but needs no kernel of its own. `needs` is what a machine may
    lack, where all of the row's tests are skipped without it.
    """

    name: str
    how: str
    kernels: tuple[str, ...] | None = None
    needs: str = ""


CATALOGUE: dict[str, tuple[Feature, ...]] = {
    "Endpoints": (
        Feature("Chat completions, whole or streamed", "`POST /v1/chat/completions`"),
        Feature("Completions, likelihoods of prompts", "`POST /v1/completions`, `echo`"),
        Feature("Responses, kept and gone on with", "`POST /v1/responses`, `previous_response_id`"),
        Feature("Responses in the background", "`background`, `GET /v1/responses/{id}?stream=true`"),
        Feature("Anthropic's Messages", "`POST /v1/messages`, `count_tokens`"),
        Feature("Embeddings", "`POST /v1/embeddings`"),
        Feature("Tokens", "`POST /tokenize`, `/detokenize`"),
        Feature("Models, version, probes", "`GET /v1/models`, `/version`, `/health`, `/ping`"),
        Feature("API as a document", "`GET /openapi.json`, `/docs`"),
    ),
    "Clients": (
        Feature("OpenAI's for Python", "`base_url=\"http://.../v1\"`"),
        Feature("OpenAI's for Node", "`baseURL: \"http://.../v1\"`", needs="Node and npm's registry"),
        Feature("Anthropic's for Python", "`base_url=\"http://...\"`"),
        Feature("LangChain", "`ChatOpenAI(base_url=...)`, `ChatAnthropic(base_url=...)`"),
        Feature("LiteLLM", "`openai/`, `hosted_vllm/`, `anthropic/`", needs="Python's registry"),
        Feature("LM Evaluation Harness", "`--model local-completions`, `local-chat-completions`"),
        Feature("Chat page", "`/`"),
        Feature("Python without a server", "`from dashinfer import LLM`"),
    ),
    "Sampling": (
        Feature("Temperature, cuts, penalties, biases",
                "`top_p`, `top_k`, `min_p`, `repetition_penalty`, `logit_bias`, ...", (r"^sampling-",)),
        Feature("Choices, seeds, stops, lengths", "`n`, `seed`, `stop`, `min_tokens`, ..."),
        Feature("Log-probabilities", "`logprobs`, `top_logprobs`", (r"^sampling-(top|logprob)$",)),
    ),
    "Structured output": (
        Feature("JSON, JSON Schema", "`response_format`, `guided_json`", MASK),
        Feature("Regular expressions, choices, grammars", "`response_format`, `structured_outputs`, `guided_...`", MASK),
    ),
    "Tools": (
        Feature("Calls of tools, whole or streamed", "`tools`, `tool_choice`, `--tool-call-parser`"),
        Feature("Calls that validate", "`tool_choice` `required` or a name, `strict`", MASK),
    ),
    "Reasoning": (
        Feature("Thinking apart from the answer", "`reasoning_content`, `--reasoning-parser`"),
        Feature("Thinking switched and bounded", "`reasoning_effort`, `chat_template_kwargs`, `max_thinking_tokens`"),
    ),
    "Models": (
        Feature("Llama, Mistral", "`--model HuggingFaceTB/SmolLM2-1.7B-Instruct`", TEXT),
        Feature("Qwen2, Qwen2.5", "`--model Qwen/Qwen2.5-7B-Instruct`", TEXT),
        Feature("Qwen3", "`--model Qwen/Qwen3-8B`", (*TEXT, r"^rope-.*-norm")),
        Feature("Qwen2-VL, Qwen2.5-VL", "`--model Qwen/Qwen2-VL-7B-Instruct`", (*TEXT, *TOWER, r"^rope-.*-mrope")),
        Feature("Qwen3-VL", "`--model Qwen/Qwen3-VL-8B-Instruct`", (*TEXT, *TOWER, r"^rope-.*-mrope")),
        Feature("From Hugging Face or a directory", "`--model ID` or `DIRECTORY`, safetensors"),
        Feature("GGUF, with weights of 4 to 32 bits", "`--model FILE.gguf`", (r"^weight_only-int4-zeros",)),
    ),
    "Quantisation": (
        Feature("Weights of 8 or 4 bits", "`--quant-type a16w8`, `a16w4`", (r"^weight_only-int8", r"^weight_only-int4")),
        Feature("Weights and activations of 8 bits", "`--quant-type a8w8`", (r"^scaled-int8", *ROWS_TO_INT8)),
        Feature("Float8", "`--quant-type fp8`", (r"^scaled-fp8-\w+-sm", *ROWS_TO_FLOAT8)),
        Feature("GPTQ and AWQ checkpoints", "found in `config.json`", (r"^weight_only-int4-zeros", r"^weight_only-int8")),
        Feature("compressed-tensors checkpoints", "found in `config.json`",
                (r"^weight_only-int4", r"^scaled-int8", r"^scaled-fp8", *ROWS_TO_INT8)),
        Feature("Float8 checkpoints", "found in `config.json`", (r"^scaled-fp8-.*-blocks-", *ROWS_TO_FLOAT8)),
        Feature("KV cache of 8-bit integers", "`--kv-cache-dtype int8`",
                (r"^decode-.*-int8", r"^prefill-.*-i8-", r"^rope-.*-int8")),
        Feature("KV cache of float8", "`--kv-cache-dtype fp8`",
                (r"^decode-.*-float8", r"^prefill-.*-fp8e4nv-", r"^rope-.*-fp8")),
    ),
    "Vision": (
        Feature("Images", "`image_url`: `http:`, `data:`, `file:`"),
        Feature("Videos", "`video_url`: MP4, WebM, GIF, frames"),
        Feature("Tower in our own kernels or the model's", "`--vision-engine native`, `transformers`", TOWER),
        Feature("Tower in TensorRT", "`--vision-engine tensorrt`", ()),
    ),
    "Parallelism and recovery": (
        Feature("Continuous batching, prefix cache, preemption", "always; `--disable-prefix-cache`", ()),
        Feature("Same bits in any company", "`--deterministic`", (r"^invariant_linear-",)),
        Feature("CUDA graphs", "always on a GPU; `--enforce-eager`", ()),
        Feature("Layers split over ranks", "`--tensor-parallel`", ()),
        Feature("Layers dealt over stages", "`--pipeline-parallel`", ()),
        Feature("Copies that share the requests", "`--data-parallel`", ()),
        Feature("Several machines", "`--nnodes`", ()),
        Feature("Streams outlive dead and hanging workers", "always; `--max-restarts`"),
    ),
    "Operations": (
        Feature("Metrics for Prometheus and Grafana", "`GET /metrics`"),
        Feature("OpenTelemetry traces", "`--otlp-traces-endpoint`, `traceparent`"),
        Feature("Structured logs, request ids", "`--log-format json`, `x-request-id`"),
        Feature("TLS, HTTP/2, proxies, sockets, CORS",
                "`--ssl-certfile`, `--root-path`, `--uds`, `--cors-origins`"),
        Feature("Requests finish before an end", "SIGTERM, `--drain-timeout`"),
        Feature("A load generator", "`dashinfer_bench`"),
    ),
    "Security": (
        Feature("Keys with limits of their own", "`--api-keys`, `--api-keys-file`, `--rate-limit-...`"),
        Feature("Media from public addresses alone", "`--allowed-media-domains`, `--allow-private-media`"),
    ),
}  # fmt: skip
