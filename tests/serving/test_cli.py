"""The command line: flags, messages, exit statuses."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError
from dashinfer.serving import cli


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dashinfer.serving", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_defaults_are_the_documented_ones() -> None:
    config = cli.parse_arguments(["--model", "Qwen/Qwen2.5-7B-Instruct"])

    assert config == ServerConfig(model="Qwen/Qwen2.5-7B-Instruct")
    assert (config.host, config.port, config.tensor_parallel, config.max_batch) == ("0.0.0.0", 8000, 1, 32)
    assert (config.mode, config.data_type, config.api_keys, config.log_level) == ("auto", "bfloat16", (), "info")
    assert (config.vision_engine, config.min_pixels, config.max_pixels) == (
        None,
        3136,
        12845056,
    )  # None: tensorrt where it runs
    assert config.model_name == "Qwen2.5-7B-Instruct"


def test_every_flag() -> None:
    config = cli.parse_arguments(
        shlex.split(
            "--model m --mode llm --host ::1 --port 0 --tensor-parallel 1 --max-batch 64 --max-length 16384 "
            "--data-type float16 --api-keys sk-key1,sk-key2 --log-level debug --vision-engine transformers --min-pixels 1 "
            "--max-pixels 2 --allowed-media-path / --allowed-media-domains Example.com,b.org. --allow-private-media "
            "--media-timeout 2.5 --max-media-bytes 1MiB --media-cache-memory 2MiB "
            "--served-model-name name --max-queue 3 --drain-timeout 1.5 "
            "--step-timeout 9 --device cpu --load-format dummy --kv-cache-memory 4GiB --block-size 32 --max-step-tokens 100 "
            "--disable-prefix-cache --deterministic --quant-type a16w4 --quant-group-size 64 --quantize-head "
            "--kv-cache-dtype int8 --gpu-memory-utilization 0.5 --enforce-eager"
        )
    )

    assert config == ServerConfig(
        model="m", mode="llm", host="::1", port=0, tensor_parallel=1, max_batch=64, max_length=16384, data_type="float16",
        api_keys=("sk-key1", "sk-key2"), log_level="debug", vision_engine="transformers", min_pixels=1, max_pixels=2,
        allowed_media_path=Path("/"), allowed_media_domains=("example.com", "b.org"), allow_private_media=True,
        media_timeout=2.5, max_media_bytes=2**20, media_cache_memory=2**21,
        served_model_name="name", max_queue=3, drain_timeout=1.5, step_timeout=9.0, device="cpu",
        load_format="dummy", kv_cache_memory=4 * 2**30, block_size=32, max_step_tokens=100, disable_prefix_cache=True,
        deterministic=True, quant_type="a16w4", quant_group_size=64, quantize_head=True, kv_cache_dtype="int8",
        gpu_memory_utilization=0.5, enforce_eager=True,
    )  # fmt: skip


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])

    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(ServerConfig):
        assert "--" + field.name.replace("_", "-") in shown
        assert " ".join(field.metadata["help"].split())[:30] in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "dashinfer_serve --model demo"),
        (["--modle", "demo"], "unknown flag --modle (did you mean --mode or --model?)"),
        (["--model", "demo", "--max_batch=3"], "unknown flag --max_batch (did you mean --max-batch?)"),
        (["demo"], "--model demo"),
        (["--model"], "--model: expected one argument"),
        (["--model", "demo", "--port", "80000"], "80000 is not a port number"),
        (["--model", "demo", "--port", "http"], "'http' is not a whole number"),
        (["--model", "demo", "--data-type", "bfloat"], "did you mean bfloat16?"),
        (["--model", "demo", "--kv-cache-memory", "lots"], "write for example 4GiB"),
        (["--model", "demo", "--block-size", "17"], "not a power of two"),
        (["--model", "demo", "--kv-cache-memory", "9" * 400], "is not a size"),
        (["--model", "demo", "--api-keys", ","], "no key given"),
        (["--model", "demo", "--allowed-media-path", "/nowhere"], "'/nowhere' is not a directory"),
        (["--model", "demo", "--allowed-media-domains", ","], "no domain given"),
        (["--model", "demo", "--allowed-media-domains", "https://example.com"], "'https://example.com' is not a domain"),
        (["--model", "demo", "--allowed-media-domains", "*.example.com"], "write example.com, which includes subdomains"),
        (["--model", "demo", "--max-media-bytes", "0"], "0 is not at least 1 byte"),
        (["--model", " "], "--model is empty"),
        (["--model", "demo", "--drain-timeout", "soon"], "--drain-timeout: 'soon' is not a number"),
        (["--model", "demo", "--min-pixels", "9", "--max-pixels", "8"], "--min-pixels 9 is more than --max-pixels 8"),
        (["--model", "demo", "--pipeline-parallel", "2", "--nnodes", "3"], "--nnodes 3 does not divide the number of workers"),
        (["--model", "demo", "--quant-type", "fp8", "--quant-group-size", "64"], "goes with --quant-type a16w4 or a16w8"),
        (["--model", "demo", "--quant-type", "a16w4", "--quant-group-size", "48"], "is none of 32, 64 and 128"),
        (["--model", "demo", "--quantize-head"], "--quantize-head goes with --quant-type"),
    ],
)
def test_a_bad_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(arguments)

    shown = capsys.readouterr()
    assert status == 2
    assert shown.out == ""
    assert shown.err.startswith("dashinfer_serve: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_bad_flags_raise_for_callers() -> None:
    with pytest.raises(ConfigurationError, match="unknown flag"):
        cli.parse_arguments(["--nothing"])


def test_variables_stand_for_flags_that_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"DASHINFER_MODEL": "other", "DASHINFER_API_KEYS": "sk-1, sk-2", "DASHINFER_MAX_BATCH": "64"}
    config = cli.parse_arguments(["--model", "demo", "--max-batch", "8"], environment)

    assert config == ServerConfig(model="demo", api_keys=("sk-1", "sk-2"), max_batch=8)
    assert cli.parse_arguments([], environment).model == "other"
    monkeypatch.setenv("DASHINFER_API_KEYS", "sk-3")
    assert cli.parse_arguments(["--model", "demo"]).api_keys == ("sk-3",)


def test_flags_and_variables_go_before_what_torchrun_tells() -> None:
    told = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    environment = {"TORCHELASTIC_RUN_ID": "none", "DASHINFER_MASTER_ADDR": "10.0.0.2", **told}
    plain = cli.parse_arguments(["--model", "demo"], environment)
    with_flag = cli.parse_arguments(["--model", "demo", "--master-port", "1234"], environment)

    assert (plain.master_addr, plain.master_port) == ("10.0.0.2", 29401)
    assert (with_flag.master_addr, with_flag.master_port) == ("10.0.0.2", 1234)


def test_torchruns_other_processes_have_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "1"}
    for name, value in (told | {"TORCHELASTIC_RUN_ID": "none"}).items():
        monkeypatch.setenv(name, value)

    assert cli.main(["--model", "demo"]) == 0
    assert capsys.readouterr().err == "dashinfer_serve: the process of LOCAL_RANK 0 starts all workers of this machine\n"


def test_as_a_process() -> None:
    version, nothing = command("--version"), command()

    assert (version.returncode, version.stdout) == (0, f"dashinfer {cli.version()}\n")
    assert nothing.returncode == 2
    assert "--model demo" in nothing.stderr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dashinfer.serving.cli", ["trio", "pydantic", "quart", "hypercorn", "tokenizers", "rich", "torch"]),
        ("import dashinfer.serving.run", ["pydantic", "quart", "hypercorn", "tokenizers", "rich", "torch", "jinja2"]),
        ("import dashinfer.serving.asgi, dashinfer.serving.chat", ["torch", "transformers", "numpy"]),
    ],
)
def test_what_is_imported_when(statement: str, absent: list[str]) -> None:
    """The worker is to start before the HTTP stack is there, and torch is never to be."""
    program = f"import sys; {statement}; print(sorted(set({absent}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout == "[]\n"
