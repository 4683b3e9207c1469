"""`dashinfer_serve`: flags, and variables for those not given, to a `ServerConfig`; errors to one line and an exit status.

The flags are made from the fields of `ServerConfig`, so there is one place where a setting is defined. Nothing heavy is
imported before the flags are known to be good: `--help` and a mistyped flag answer at once.
"""

import argparse
import dataclasses
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from dashinfer.config import ServerConfig, choices, did_you_mean, flag, parse_setting
from dashinfer.errors import ConfigurationError, StartupError
from dashinfer.serving.environment import environment_settings, torchrun_settings

_HOW_TO_START = (
    "no model given; start with `dashinfer_serve --model demo`, or give a Hugging Face ID, a local directory or a .gguf file"
)


def version() -> str:
    """The installed distribution's version, or the one in `pyproject.toml` of a source tree that is not installed."""
    try:
        return metadata.version("dashinfer")
    except metadata.PackageNotFoundError:
        import tomllib

        with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
            return tomllib.load(file)["project"]["version"]


class _Parser(argparse.ArgumentParser):
    """Reports errors as one line, with the nearest known spelling."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


class _ShowVersion(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"dashinfer {version()}")
        parser.exit()


def _reader(field: dataclasses.Field) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return parse_setting(field, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"]
    if field.default not in (None, (), False, dataclasses.MISSING) and "default" not in text:
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def make_parser() -> argparse.ArgumentParser:
    """A parser with a flag for every setting. Errors raise ConfigurationError; what is not given is absent from the result."""
    parser = _Parser(
        prog="dashinfer_serve",
        description="Serve a model behind an OpenAI-compatible API.",
        epilog="First try: dashinfer_serve --model demo. A setting without a flag is taken from the environment: "
        "DASHINFER_API_KEYS for --api-keys, which keeps keys out of the list of processes, and so on.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action=_ShowVersion)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(ServerConfig):
        name = field.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        if field.type is bool:
            group.add_argument(flag(field.name), action="store_true", help=_help(field))
            continue
        allowed = choices(field)
        metavar = "{" + ",".join(allowed) + "}" if allowed else field.metadata["metavar"] or field.name.upper()
        group.add_argument(flag(field.name), type=_reader(field), metavar=metavar, help=_help(field))
    return parser


def parse_arguments(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """Settings from command-line arguments, from `DASHINFER_*` variables where there is no flag, and from those of torchrun.

    Raises:
        ConfigurationError: an unknown flag or variable, a bad value, or no model.
        SystemExit: after `--help` or `--version`.
    """
    parser = make_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            raise ConfigurationError(f"unexpected argument {word!r}; a model is given as --model {word}")
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigurationError(
            f"unknown flag {word}" + (did_you_mean(word.replace("_", "-"), flags, most=2) or "; see --help")
        )
    values = torchrun_settings(environment) | environment_settings(environment) | vars(known)
    if "model" not in values:
        raise ConfigurationError(_HOW_TO_START)
    return ServerConfig(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 after a clean shutdown, 2 for a bad flag, 130 after Ctrl-C while loading."""
    try:
        config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    except ConfigurationError as error:
        print(f"dashinfer_serve: error: {error}", file=sys.stderr)
        return error.exit_code
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            print("dashinfer_serve: the process of LOCAL_RANK 0 starts all workers of this machine", file=sys.stderr)
            return 0
        # Workers meet by themselves. With this they would look for a store of torchrun's where they meet, and wait for ever.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    try:
        status = _serve(config)
    except KeyboardInterrupt:
        status = 130
    except StartupError as error:
        if config.log_level == "debug":
            traceback.print_exc()
        print(f"dashinfer_serve: error: {error}", file=sys.stderr)
        status = error.exit_code
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # all that one could still change is the exit status
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        # A download that was abandoned has threads of its own, and the interpreter would wait for all they still have to fetch.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _serve(config: ServerConfig) -> int:
    try:
        if config.node_rank:
            from dashinfer.serving.node import run
        else:
            from dashinfer.serving.run import run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("dashinfer"):
            raise
        raise StartupError(f'the package {error.name} is not installed; run: pip install "dashinfer[serving]"') from error
    return run(config)
