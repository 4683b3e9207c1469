"""The server's settings: one frozen dataclass, made once from flags or from `DASHINFER_*` environment variables.

Knows every setting's name, default, choices and meaning; knows nothing of what they lead to. The command line
(`serving/cli.py`) and the reader of the environment (`serving/environment.py`) are both made from the fields below, so they
cannot drift apart.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dashinfer import setting_values as values
from dashinfer.errors import ConfigurationError
from dashinfer.types import DataType, KVCacheDtype, QuantType, VisionEngine

Mode = Literal["auto", "llm", "vlm"]
ToolParserName = Literal["auto", "none", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"]
ReasoningParserName = Literal["auto", "none", "qwen3", "deepseek_r1", "mistral"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LoadFormat = Literal["auto", "dummy"]
Device = Literal["auto", "cuda", "cpu"]


def _setting(
    default: Any,
    help: str,
    *,
    group: str = "Common options",
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "parse": parse, "metavar": metavar})


_VLM = "VLM options (ignored in LLM mode)"
_ENGINE = "Engine options"
_PARALLEL = "Workers and machines"
_SERVER = "Server options"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """All settings. Sizes are in bytes, lengths in tokens, times in seconds."""

    model: str = _setting(
        dataclasses.MISSING,
        "Hugging Face model ID, local directory, .gguf file, or a small model to try: `demo`, or `demo-vlm`, which sees",
        parse=str,
    )
    mode: Mode = _setting("auto", "what to serve the model as; auto detects it, llm serves a vision-language model's text side")
    host: str = _setting("0.0.0.0", "address to bind", parse=str)
    port: int = _setting(8000, "port to bind; 0 picks a free one", parse=values.port)
    tensor_parallel: int = _setting(1, "number of GPUs to split every layer over", parse=values.positive, metavar="N")
    max_batch: int = _setting(32, "most sequences that run at once", parse=values.positive, metavar="N")
    max_length: int | None = _setting(
        None,
        "longest sequence, prompt and output, in tokens (default: 8192, or the model's own limit where that is less)",
        parse=values.positive,
        metavar="N",
    )
    data_type: DataType = _setting("bfloat16", "type of weights and activations")
    api_keys: tuple[str, ...] = _setting(
        (),
        "comma-separated keys; requests must carry one, but for probes, the documentation and the chat page",
        parse=values.keys,
        metavar="KEYS",
    )
    log_level: LogLevel = _setting("info", "how much to log")

    vision_engine: VisionEngine | None = _setting(
        None, "what runs the vision tower (default: tensorrt; native where TensorRT or a GPU is missing)", group=_VLM
    )
    min_pixels: int = _setting(
        3136,
        "least image size in pixels; unless it is set, the model's own where that is more",
        group=_VLM,
        parse=values.positive,
        metavar="N",
    )
    max_pixels: int = _setting(
        12845056,
        "greatest image size in pixels; unless it is set, the model's own where that is less",
        group=_VLM,
        parse=values.positive,
        metavar="N",
    )
    allowed_media_path: Path | None = _setting(
        None, "directory whose files requests may name by file: URLs", group=_VLM, parse=values.directory, metavar="DIRECTORY"
    )
    allowed_media_domains: tuple[str, ...] = _setting(
        (),
        "comma-separated domains, each with its subdomains, that media may come from; without it, all",
        group=_VLM,
        parse=values.domains,
        metavar="DOMAINS",
    )
    allow_private_media: bool = _setting(
        False, "fetch media from private, loopback and other addresses that are not public too", group=_VLM
    )
    media_timeout: float = _setting(
        20.0, "seconds that fetching one medium may take", group=_VLM, parse=values.seconds, metavar="SECONDS"
    )
    max_media_bytes: int = _setting(
        67108864, "greatest size of one medium in bytes, such as 64MiB", group=_VLM, parse=values.positive_size, metavar="SIZE"
    )
    media_cache_memory: int | None = _setting(
        None,
        "memory of a rank for embeddings of images and videos, such as 512MiB "
        "(default: what is free, a twentieth at most, up to 256MiB on a CPU and 1GiB on a GPU)",
        group=_VLM,
        parse=values.positive_size,
        metavar="SIZE",
    )

    served_model_name: str | None = _setting(
        None, "name in the API (default: last part of --model)", group=_SERVER, parse=str, metavar="NAME"
    )
    max_queue: int = _setting(
        256,
        "most requests that may wait for a place to run; one more gets a 429",
        group=_SERVER,
        parse=values.positive,
        metavar="N",
    )
    drain_timeout: float = _setting(
        30.0,
        "seconds that running requests may take to finish after SIGINT or SIGTERM",
        group=_SERVER,
        parse=values.seconds,
        metavar="SECONDS",
    )
    step_timeout: float = _setting(
        300.0,
        "seconds after which a step that gives no result counts as a hang",
        group=_SERVER,
        parse=values.seconds,
        metavar="SECONDS",
    )
    tool_call_parser: ToolParserName = _setting(
        "auto", "how the model writes calls of tools; auto finds out from its chat template and vocabulary", group=_SERVER
    )
    reasoning_parser: ReasoningParserName = _setting(
        "auto",
        "how the model marks its thinking; auto finds out from its chat template and vocabulary, none leaves it in the answer",
        group=_SERVER,
    )
    log_format: LogFormat = _setting("text", "lines for people, or a JSON object a line", group=_SERVER)
    log_prompts: bool = _setting(False, "log the text of prompts, which is never logged otherwise", group=_SERVER)
    cors_origins: tuple[str, ...] = _setting(
        (),
        "comma-separated origins whose pages may use the API, such as https://example.com; * for all",
        group=_SERVER,
        parse=values.origins,
        metavar="ORIGINS",
    )
    ssl_certfile: Path | None = _setting(
        None, "certificate chain in PEM, to serve HTTPS; needs --ssl-keyfile", group=_SERVER, parse=values.file, metavar="FILE"
    )
    ssl_keyfile: Path | None = _setting(None, "its private key in PEM", group=_SERVER, parse=values.file, metavar="FILE")
    root_path: str = _setting(
        "",
        "path that a proxy has the API under, such as /api, whether it takes it off or not (default: none)",
        group=_SERVER,
        parse=values.root_path,
        metavar="PATH",
    )
    uds: Path | None = _setting(
        None, "Unix socket to listen on, in place of --host and --port", group=_SERVER, parse=Path, metavar="PATH"
    )
    api_keys_file: Path | None = _setting(
        None,
        "file with a key a line, besides --api-keys; read again on SIGHUP",
        group=_SERVER,
        parse=values.file,
        metavar="FILE",
    )
    rate_limit_requests: int | None = _setting(
        None, "requests a minute of a key, or of all together without keys", group=_SERVER, parse=values.positive, metavar="N"
    )
    rate_limit_tokens: int | None = _setting(
        None, "tokens a minute of a key, in prompts and answers", group=_SERVER, parse=values.positive, metavar="N"
    )
    rate_limit_concurrent: int | None = _setting(
        None, "sequences of a key that are computed at a time", group=_SERVER, parse=values.positive, metavar="N"
    )
    otlp_traces_endpoint: str | None = _setting(
        None,
        "URL that OpenTelemetry traces are sent to, by OTLP over HTTP, such as http://localhost:4318/v1/traces",
        group=_SERVER,
        parse=values.collector,
        metavar="URL",
    )

    device: Device = _setting("auto", "where the model runs; auto takes CUDA if there is a GPU", group=_ENGINE)
    quant_type: QuantType | None = _setting(
        None,
        "quantisation of the linear layers: gptq for such checkpoints, the others round 16-bit weights while loading "
        "(default: as the checkpoint is)",
        group=_ENGINE,
    )
    quant_group_size: int | None = _setting(
        None,
        "weights that share a scale: 32, 64 or 128 (default: 128 in a16w4, all of an output's in a16w8)",
        group=_ENGINE,
        parse=values.whole,
        metavar="N",
    )
    quantize_head: bool = _setting(False, "quantise the output layer too, which else stays in 16 bits", group=_ENGINE)
    load_format: LoadFormat = _setting("auto", "dummy builds random weights of the model's shape", group=_ENGINE)
    kv_cache_memory: int | None = _setting(
        None,
        "memory of the KV cache per rank, such as 4GiB (default: what is free, up to what --max-batch sequences can use)",
        group=_ENGINE,
        parse=values.size,
        metavar="SIZE",
    )
    kv_cache_dtype: KVCacheDtype = _setting(
        "auto",
        "type of the KV cache: int8 and fp8 take about half the memory of 16 bits, with a scale for each token and head; "
        "auto is --data-type",
        group=_ENGINE,
    )
    block_size: int | None = _setting(
        None,
        "tokens in a KV cache block, a power of two (default: chosen for the device)",
        group=_ENGINE,
        parse=values.positive,
        metavar="N",
    )
    max_step_tokens: int | None = _setting(
        None,
        "most tokens computed in one step (default: chosen for the device)",
        group=_ENGINE,
        parse=values.positive,
        metavar="N",
    )
    gpu_memory_utilization: float = _setting(
        0.9,
        "share of the GPU's memory to use, for weights, KV cache and everything else",
        group=_ENGINE,
        parse=values.share,
        metavar="SHARE",
    )
    enforce_eager: bool = _setting(False, "record no CUDA graphs: slower, starts sooner", group=_ENGINE)
    disable_prefix_cache: bool = _setting(False, "compute every prompt from its first token", group=_ENGINE)
    deterministic: bool = _setting(False, "give a request the same tokens whatever else runs, at a lower speed", group=_ENGINE)

    pipeline_parallel: int = _setting(
        1,
        "number of stages to split the layers over, each of --tensor-parallel GPUs",
        group=_PARALLEL,
        parse=values.positive,
        metavar="M",
    )
    data_parallel: int = _setting(
        1, "number of copies of the model, which share the requests", group=_PARALLEL, parse=values.positive, metavar="R"
    )
    nnodes: int = _setting(
        1,
        "number of machines; the same command runs on each, but for --node-rank",
        group=_PARALLEL,
        parse=values.positive,
        metavar="N",
    )
    node_rank: int = _setting(
        0, "which of them this is; 0 takes the requests", group=_PARALLEL, parse=values.not_negative, metavar="I"
    )
    master_addr: str = _setting("127.0.0.1", "address of machine 0", group=_PARALLEL, parse=str, metavar="ADDRESS")
    master_port: int = _setting(29500, "port of machine 0 for the others", group=_PARALLEL, parse=values.port)
    cluster_secret: str | None = _setting(
        None,
        "what machines prove to each other that they belong together with; better given as DASHINFER_CLUSTER_SECRET "
        "(default: none; needed with more than one machine)",
        group=_PARALLEL,
        parse=str,
        metavar="SECRET",
    )
    cluster_interface: str | None = _setting(
        None,
        "network interface for traffic between machines, such as eth0 (default: the one that --master-addr is reached by)",
        group=_PARALLEL,
        parse=str,
        metavar="NAME",
    )
    max_restarts: int = _setting(
        8,
        "failures of workers within --restart-window after which one more fails the requests that are being computed, rather "
        "than have them repeated; and failures in a row without a step between them after which one more ends the server",
        group=_PARALLEL,
        parse=values.not_negative,
        metavar="N",
    )
    restart_window: float = _setting(
        300.0, "seconds that a failure of workers counts", group=_PARALLEL, parse=values.seconds, metavar="SECONDS"
    )
    heartbeat_timeout: float = _setting(
        10.0,
        "seconds without a sign of life after which a worker counts as dead",
        group=_PARALLEL,
        parse=values.seconds,
        metavar="SECONDS",
    )

    def __post_init__(self) -> None:
        self._check_machines()
        if self.quant_group_size is not None:
            if self.quant_group_size not in (32, 64, 128):
                raise ConfigurationError(f"--quant-group-size {self.quant_group_size} is none of 32, 64 and 128")
            if self.quant_type not in ("a16w4", "a16w8"):
                raise ConfigurationError("--quant-group-size goes with --quant-type a16w4 or a16w8")
        if self.quantize_head and self.quant_type is None:
            raise ConfigurationError("--quantize-head goes with --quant-type")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigurationError("--ssl-certfile and --ssl-keyfile go together")
        if self.min_pixels > self.max_pixels:
            raise ConfigurationError(f"--min-pixels {self.min_pixels} is more than --max-pixels {self.max_pixels}")
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ConfigurationError(f"--block-size {self.block_size} is not a power of two; use 16, 32, 64 or 128")
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_batch:
            raise ConfigurationError(
                f"--max-step-tokens {self.max_step_tokens} is less than --max-batch {self.max_batch}: "
                "every running sequence needs one"
            )
        if not self.model.strip():
            raise ConfigurationError("--model is empty; try --model demo")

    def _check_machines(self) -> None:
        if self.node_rank >= self.nnodes:
            raise ConfigurationError(f"--node-rank {self.node_rank} is not below --nnodes {self.nnodes}")
        if self.num_ranks % self.nnodes:
            sizes = " x ".join(flag(name) for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"))
            raise ConfigurationError(
                f"--nnodes {self.nnodes} does not divide the number of workers, which is {self.num_ranks} ({sizes})"
            )
        if self.nnodes == 1:
            return
        if not self.cluster_secret and not (_is_loopback(self.master_addr) and self.cluster_interface in (None, "lo")):
            raise ConfigurationError(
                "machines need a secret that they all know: set DASHINFER_CLUSTER_SECRET to the same on each, "
                "such as what `openssl rand -hex 32` prints"
            )
        if self.master_port == 0:
            raise ConfigurationError("--master-port 0: the other machines must know the port")

    @property
    def num_ranks(self) -> int:
        """Of workers, in all."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def model_name(self) -> str:
        """The model's name in the API: as set, or the last part of --model (`..` is the directory it stands for)."""
        if self.served_model_name:
            return self.served_model_name
        name = self.model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        if name in ("", ".", "..") or name.startswith("~"):
            name = Path(os.path.expanduser(self.model)).resolve().name or "model"
        return name.removesuffix(".gguf")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def flag(name: str) -> str:
    """Of a setting."""
    return "--" + name.replace("_", "-")


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1) -> str:
    """` (did you mean X?)`, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, known, n=most, cutoff=0.7)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def choices(field: dataclasses.Field) -> tuple[str, ...] | None:
    """The allowed strings of a field whose type is a Literal (or Literal or None); None for any other field."""
    candidates = [field.type, *get_args(field.type)]
    return next((get_args(kind) for kind in candidates if get_origin(kind) is Literal), None)


def parse_setting(field: dataclasses.Field, text: str) -> Any:
    """One setting from text. Raises ValueError with a message for people."""
    if (allowed := choices(field)) is not None:
        if text not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}" + did_you_mean(text, allowed))
        return text
    if field.type is bool:
        known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}
        if text.lower() not in known:
            raise ValueError(f"{text!r} is neither true nor false")
        return known[text.lower()]
    return field.metadata["parse"](text)
