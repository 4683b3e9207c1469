"""`python -m bench.quality`: quantised models beside the 16-bit one, over a text that comes with Python."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.machine import describe_machine
from bench.quality.measure import compare
from bench.quality.subject import MODES, TINY, Mode, Subject, find_files
from bench.quality.text import byte_windows, text_windows
from dashinfer.errors import DashInferError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description="Perplexity, divergence and agreement of quantised models, over the documentation that Python comes with.",
    )
    add = parser.add_argument
    add("--model", action="append", metavar="MODEL", help=f"as of the server, or {', '.join(TINY)} (default: demo, and these)")
    add("--modes", default=",".join(MODES), metavar="NAMES", help=f"of {', '.join(MODES)} (default: all)")
    add("--checkpoint", action="append", default=[], metavar="NAME=MODEL", help="compare this quantised checkpoint too")
    add("--tokens", type=int, default=20480, metavar="N", help="of the text (20480)")
    add("--window", type=int, default=1024, metavar="N", help="tokens that are read at once (1024)")
    add("--data-type", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--out", type=Path, metavar="FILE.json", help="write the results there, and a table beside it as .md")
    return parser


def measure(model: str, modes: list[Mode], checkpoints: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One model's row for each mode and checkpoint."""
    files, tokenizer_json = find_files(model)
    if tokenizer_json is None:
        rows = byte_windows(count=arguments.tokens, length=min(256, arguments.window))
    else:
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
        rows = text_windows(tokenizer, count=arguments.tokens, length=arguments.window)
    options = {"data_type": arguments.data_type, "device": arguments.device, "length": rows.shape[1]}
    baseline = Subject(files, Mode(arguments.data_type), **options)
    subjects = [Subject(files, mode, **options) for mode in modes]
    if tokenizer_json is not None:
        subjects += [Subject(find_files(path)[0], Mode(name), **options) for name, path in checkpoints.items()]

    def progress(done: int) -> None:
        print(f"\r{model}: {done} of {len(rows)} windows", end="" if done < len(rows) else "\n", file=sys.stderr, flush=True)

    tallies = compare(baseline.logits, [subject.logits for subject in subjects], rows, on_window=progress)
    found = [
        {
            "mode": subject.mode.name,
            "weight_bytes": subject.model.weight_bytes,
            "perplexity": tally.perplexity,
            "perplexity_ratio": tally.perplexity / tallies[0].perplexity,
            "divergence": tally.mean_divergence,
            "agreement": tally.agreement,
        }
        for subject, tally in zip([baseline, *subjects], tallies, strict=True)
    ]
    return {"model": model, "tokens": tallies[0].tokens, "window": rows.shape[1], "rows": found}


def table(results: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Markdown."""
    versions = machine["versions"]
    lines = [f"{machine['cpu']}; Python {machine['python']}; torch {versions['torch']}; commit {machine['commit']}."]
    for result in results:
        about = "the text is Python's own"
        if result["model"] in TINY:
            about += ", each byte a token; random weights: a perplexity means nothing"
        lines += ["", f"**{result['model']}**, {result['tokens']} tokens in windows of {result['window']} ({about})", ""]
        lines += ["| mode | weights, MiB | perplexity | ratio | divergence, nats | agreement |", "|---|---|---|---|---|---|"]
        for row in result["rows"]:
            lines.append(
                f"| {row['mode']} | {row['weight_bytes'] / 2**20:.1f} | {row['perplexity']:.4f} "
                f"| {row['perplexity_ratio']:.4f} | {row['divergence']:.5f} | {row['agreement']:.2%} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.modes.split(",")) - set(MODES):
        parser.error(f"no mode is called {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    checkpoints = dict(each.partition("=")[::2] for each in arguments.checkpoint)
    modes = [MODES[name] for name in arguments.modes.split(",")]
    try:
        results = [measure(model, modes, checkpoints, arguments) for model in arguments.model or ["demo", *TINY]]
    except (DashInferError, ValueError) as error:
        parser.error(str(error))
    machine = describe_machine()
    shown = table(results, machine)
    print(shown, end="")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
