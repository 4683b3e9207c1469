"""`dashinfer_bench`: flags to `Settings` and `Target`s; errors to one line and an exit status.

Nothing heavy is imported before the flags are known to be good.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, NoReturn

from dashinfer import __version__
from dashinfer.bench.settings import METRICS, Settings
from dashinfer.bench.target import Target, base_url, parse_body, parse_header, parse_target
from dashinfer.errors import BenchError

DEFAULT_URL = "http://127.0.0.1:8000/v1"
NEEDED = {"h11": "h11", "rich": "rich", "trio": "trio"}  # module -> what a user knows it by
DESCRIPTION = "Measures servers that speak OpenAI's API, as their clients see them; several take turns in one run."
EPILOG = (
    "Exit status: 0, or 1 if requests failed, 2 if nothing could be measured, 130 after Ctrl-C, which shows what was measured "
    "until then. First try: dashinfer_bench --concurrency 1,8 --rounds 1"
)


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def finite(text: str) -> float:
    value = positive(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(at_least_one(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,4,16") from None


def rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(positive(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rates such as 0.5,2,inf") from None


def percentages(text: str) -> tuple[float, ...]:
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentiles such as 50,90,99.9")
    return values


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [part.split("x") for part in text.split(",")]
        return tuple((at_least_one(width), at_least_one(height)) for width, height in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 224x224,640x480") from None


def mark(text: str) -> tuple[str, float]:
    """`ttft:500` as the name of a time and seconds."""
    name, _, milliseconds = text.partition(":")
    name = "e2e" if name == "e2el" else name
    try:
        if name in METRICS:
            return name, positive(milliseconds) / 1000
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a mark such as ttft:500; there are {', '.join(METRICS)}, in milliseconds"
    )


class _Parser(argparse.ArgumentParser):
    """Reports errors as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[-1]}: error: {message}; see --help\n")


def version() -> str:
    try:
        return metadata.version("dashinfer")
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return __version__


def make_parser(program: str = "dashinfer_bench") -> argparse.ArgumentParser:
    """A parser whose results `read_targets` and `read_settings` take."""
    parser = _Parser(prog=program, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dashinfer {version()}")

    add = parser.add_argument_group("server").add_argument
    add("--url", help=f"base URL; without a path, /v1 is added (default: {DEFAULT_URL})")
    add("--model", help="the model's name in requests (default: the first one that the server lists)")
    add("--endpoint", choices=("chat", "completions"), default="chat", help="what is asked (default: chat)")
    add("--api-key", metavar="KEY", help="sent as a bearer token to every target (default: OPENAI_API_KEY, where it is set)")
    add("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request; repeatable")
    add("--body", action="append", default=[], metavar="[LABEL=]JSON", help="fields added to each request; repeatable")
    add("--timeout", type=finite, default=600.0, metavar="SECONDS", help="for an answer (default: 600)")
    add("--wait", type=finite, default=0.0, metavar="SECONDS", help="for a server that does not answer yet (default: 0)")

    add = parser.add_argument_group("several servers").add_argument
    add("--target", action="append", default=[], metavar="LABEL=URL[=MODEL]", help="a server; repeatable, measured in turns")
    add("--label", default="server", help="the name of --url's server in tables (default: server)")
    add("--baseline", metavar="LABEL", help="show ratios to this target (default: the last one)")

    group = parser.add_argument_group("load")
    kind, length = group.add_mutually_exclusive_group(), group.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        type=levels,
        default=(1, 4, 16, 32),
        metavar="N,...",
        help="closed loop: so many workers, each sending its next request when its last has ended (default: 1,4,16,32)",
    )
    kind.add_argument(
        "--request-rate",
        type=rates,
        default=(),
        metavar="R,...",
        help="open loop: so many requests/s, sent when they are due; inf sends all at once",
    )
    add = group.add_argument
    add(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="of an open loop: gaps between requests drawn, or all the same (default: poisson)",
    )
    add("--max-concurrency", type=at_least_one, metavar="N", help="of an open loop: requests under way at once; more wait")
    length.add_argument(
        "--requests",
        type=at_least_one,
        metavar="N",
        help="in a round, rounded up to a multiple of the concurrency (default: two a worker, at least 4; of an open loop, "
        "10 seconds' worth)",
    )
    length.add_argument("--duration", type=finite, metavar="SECONDS", help="of a round: what runs by then still ends")
    add("--rounds", type=at_least_one, default=3, metavar="N", help="at each level; figures are their medians (default: 3)")
    add(
        "--warmup",
        type=not_negative,
        metavar="N",
        help="requests before anything is measured (default: the highest concurrency; of an open loop, 4)",
    )

    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    add("--prompt-tokens", type=at_least_one, default=105, metavar="N", help="of prompts, template included (default: 105)")
    add("--output-tokens", type=at_least_one, metavar="N", help="of answers (default: 64, or what --dataset says)")
    add("--range-ratio", type=float, default=0.0, metavar="R", help="draw both lengths from 1-R to 1+R of theirs (default: 0)")
    add("--shared-prefix", type=not_negative, default=0, metavar="N", help="tokens that prompts have in common (default: 0)")
    add("--prefixes", type=at_least_one, default=1, metavar="N", help="different shared prefixes, in turn (default: 1)")
    add("--dataset", type=Path, metavar="FILE", help="prompts of a JSON or JSONL file: ShareGPT, prompt, or messages")
    add("--images", type=sizes, default=(), metavar="WxH,...", help="ask about a picture, of these sizes in turn")
    add("--image-format", choices=("png", "jpeg"), default="jpeg", help="of the pictures' files (default: jpeg)")
    add("--seed", type=int, default=0, help="of all that is drawn; take another for a server that has seen it (default: 0)")

    add = parser.add_argument_group("results").add_argument
    add(
        "--percentiles",
        type=percentages,
        default=(50.0, 90.0, 99.0),
        metavar="P,...",
        help="of TTFT, TPOT, inter-token latency and end-to-end latency (default: 50,90,99)",
    )
    add(
        "--goodput",
        type=mark,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME:MS",
        help="count requests that keep to all of these marks, such as ttft:500 tpot:50 itl:50 e2e:5000",
    )
    add("--out", type=Path, metavar="FILE.json", help="write results there, and FILE.md and FILE.svg beside it")
    add("--json", action="store_true", help="print results as JSON, and everything else to standard error")
    add("--detailed", action="store_true", help="in JSON, have the times of each request")
    return parser


def read_settings(arguments: argparse.Namespace) -> Settings:
    """What is measured. Raises BenchError."""
    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    given["output_tokens"] = arguments.output_tokens or Settings.output_tokens
    given["dataset"] = arguments.dataset and arguments.dataset.name
    return Settings(**given | {"goodput": tuple(dict(arguments.goodput).items())})


def read_targets(arguments: argparse.Namespace) -> list[Target]:
    """The targets, labels all different. Raises BenchError."""
    key = arguments.api_key or os.environ.get("OPENAI_API_KEY")
    targets = [parse_target(text, key) for text in arguments.target]
    if arguments.url or not targets:
        if (url := base_url(arguments.url or DEFAULT_URL)) is None:
            raise BenchError(f"{arguments.url!r} is not a URL; write --url http://HOST:PORT/v1")
        targets.append(Target(label=arguments.label, url=url, model=arguments.model, api_key=key))
    elif arguments.model:
        raise BenchError("--model goes with --url; name a target's as LABEL=URL=MODEL")
    by_label = {target.label: target for target in targets}
    if len(by_label) < len(targets):
        raise BenchError("two targets have the same label")
    headers = dict(map(parse_header, arguments.header))
    bodies = [parse_body(text) for text in arguments.body]
    for label, _ in bodies:
        if label is not None:
            known_label(label, targets)
    return [
        replace(
            target,
            headers=headers,
            body={name: value for label, body in bodies if label in (None, target.label) for name, value in body.items()},
        )
        for target in targets
    ]


def known_label(label: str, targets: Sequence[Target]) -> str:
    """The label again. Raises BenchError if no target has it."""
    if all(target.label != label for target in targets):
        raise BenchError(f"{label!r} is no target; there are {', '.join(target.label for target in targets)}")
    return label


def read_baseline(arguments: argparse.Namespace, targets: Sequence[Target]) -> str | None:
    """The label of the target to compare with, if there is one. Raises BenchError."""
    default = targets[-1].label if len(targets) > 1 else None
    return known_label(arguments.baseline, targets) if arguments.baseline else default


def check_packages(settings: Settings) -> None:
    """Raises BenchError where a package is missing that the extra `bench` brings."""
    needed = NEEDED | ({"PIL": "pillow"} if settings.images else {})
    missing = [name for module, name in needed.items() if util.find_spec(module) is None]
    if missing:
        raise BenchError(f'{", ".join(missing)} not installed; pip install "dashinfer[bench]"')


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status; the parser's epilog says which there are."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = make_parser().parse_args(given)
    try:
        targets, settings = read_targets(parsed), read_settings(parsed)
        baseline = read_baseline(parsed, targets)
        check_packages(settings)
    except BenchError as error:
        print(f"dashinfer_bench: error: {error}", file=sys.stderr)
        return 2
    from dashinfer.bench import command

    return command.main(parsed, given, targets, settings, baseline)
