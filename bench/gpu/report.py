"""Rows of a GPU run as JSON and Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
PEER_LEAST = 5.0  # times the peer's output tokens/s, at batch 256
PEER_BATCH = 256


def of(rows: Iterable[Row], section: str) -> list[Row]:
    return [row for row in rows if row["section"] == section]


def compare_with_peer(rows: Sequence[Row]) -> list[Row]:
    """For each batch that both sections measured, how many times the peer's output tokens/s the engine gives."""
    peers = {row["batch"]: row for row in of(rows, "peer") if row.get("status") == "ok"}
    found = []
    for row in of(rows, "engine"):
        if row.get("status") != "ok" or row.get("batch") not in peers:
            continue
        ratio = row["tokens_per_second"] / peers[row["batch"]]["tokens_per_second"]
        marks = []
        if row["batch"] == PEER_BATCH:
            marks.append({"what": ">= 5x transformers continuous batching", "measured": ratio, "met": ratio >= PEER_LEAST})
        found.append({"section": "comparison", "batch": row["batch"], "ratio": ratio, "marks": marks})
    return found


def failures(rows: Iterable[Row]) -> list[Row]:
    """Rows whose op is wrong or died; what was not measured is none of them."""
    return [row for row in rows if row.get("status", "ok").startswith(("wrong", "failed"))]


def as_markdown(result: Row) -> str:
    """The tables, and beneath them what one must know to read them."""
    rows = [*result["rows"], *compare_with_peer(result["rows"])]
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = ["# GPU run", ""]
    if result["dry_run"]:
        lines += ["**A dry run on CPU with toy sizes: the figures mean nothing.**", ""]
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    where = machine["gpus"][0] if machine["gpus"] else machine["cpu"]
    lines += [
        f"{where}; Python {machine['python']}; {versions}; commit {machine['commit']}{changed}; {result['created']}.",
        "",
        "| section | outcome | seconds |",
        "|---|---|---|",
        *(f"| {name} | {each['outcome']} | {each['seconds']:.0f} |" for name, each in result["sections"].items()),
        "",
    ]
    # what speaks of a whole section
    lines += [
        f"- {name(row)}: {row['status']}" for row in rows if row.get("status", "ok") != "ok" and not {"op", "batch"} & set(row)
    ]
    lines += [""] if lines[-1] else []
    for row in of(rows, "ceilings"):
        copy, matmul = row["copy_bytes_per_second"] / 1e12, row["matmul_flops"] / 1e12
        lines += [
            f"Ceilings measured in this run: copy {copy:.2f} TB/s (read and written), matmul {matmul:.0f} TFLOP/s.",
            "",
        ]
    if marks := list(marked(rows)):
        lines += ["## Marks", "", "| what | mark | measured | met |", "|---|---|---|---|"]
        lines += [
            f"| {what} | {mark['what']} | {_figure(mark['measured'])} | {'yes' if mark['met'] else '**no**'} |"
            for what, mark in marks
        ]
        lines.append("")
    lines += _kernels(of(rows, "kernels"))
    lines += _engine(rows)
    lines += _quantized(rows)
    lines += _vlm([row for row in of(rows, "vlm") if "batch" in row])
    lines += _demo(of(rows, "demo"))
    lines += ["Made with:", "", "```bash", result["command"], "```", ""]
    return "\n".join(lines)


def marked(rows: Iterable[Row]) -> Iterable[tuple[str, Row]]:
    """Every mark, with what it was set for."""
    for row in rows:
        for mark in row.get("marks", ()):
            yield name(row), mark


def name(row: Row) -> str:
    if "op" in row:
        return ", ".join([row["op"], row["model"], row["shape"]])
    mode = [row["quant_type"]] if "quant_type" in row else []
    batch = [f"batch {row['batch']}"] if "batch" in row else []
    return ", ".join([row["section"], *mode, *batch])


def _kernels(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Kernels",
        "",
        "`ceiling`: the time that the copy bandwidth or the matmul rate allows, over the measured one. `library`: the time",
        "of the fastest library call over ours. One layer's call; medians of graph replays over inputs that take turns.",
        "",
        "| op | model | shape | us | rate | ceiling | library | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['op']} | {row['model']} | {row['shape']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']} | | | | |")
            continue
        best = max(row["ratios"], key=lambda label: -row["libraries_us"][label], default=None)
        library = "" if best is None else f"{row['ratios'][best]:.2f}x {best}"
        rate = f"{row['rate'] / 1e12:.2f} {row['unit']}"
        lines.append(f"{head} {row['us']:.1f} | {rate} | {row['fraction']:.0%} | {library} | {row['spread']:.0%} |")
    return [*lines, ""]


def _engine(rows: Sequence[Row]) -> list[str]:
    batches = [row for row in rows if row["section"] in ("engine", "peer") and "batch" in row]
    if not batches:
        return []
    ratios = {row["batch"]: row["ratio"] for row in of(rows, "comparison")}
    lines = [
        "## Engine",
        "",
        "All prompts of a batch are sent at once, so TPOT holds the prefills of others. `step`: the median of steps in",
        "which all sequences decode. `floor`: reading all weights and the KV cache once, at the copy bandwidth.",
        "`idle`: the share of time in which the GPU did nothing while all sequences decoded: in any gap, and in those of",
        "10 us and more. `ratio`: output tokens/s over the peer's.",
        "",
        "| what | batch | tokens/s | ratio | TTFT p50, max, ms | TPOT p50, max, ms | step, ms | floor, ms | / floor | idle |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(batches, key=lambda row: (row["batch"], row["section"])):
        head = f"| {row.get('peer', 'dashinfer')} | {row['batch']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']} | | | | | | | |")
            continue
        ratio = f"{ratios[row['batch']]:.2f}x" if row["section"] == "engine" and row["batch"] in ratios else ""
        own = " | ".join(_figure(row.get(key)) for key in ("step_p50_ms", "floor_ms", "tpot_over_floor"))
        idle = "" if row.get("idle") is None else f"{row['idle']:.1%}, {row['idle_waiting']:.1%}"
        lines.append(
            f"{head} {row['tokens_per_second']:.0f} | {ratio} | {row['ttft_p50_ms']:.1f}, {row['ttft_max_ms']:.1f} | "
            f"{row['tpot_p50_ms']:.2f}, {row['tpot_max_ms']:.2f} | {own} | {idle} |"
        )
    return [*lines, ""]


def _quantized(rows: Sequence[Row]) -> list[str]:
    modes = [row for row in of(rows, "quantized") if "batch" in row]
    if not modes:
        return []
    plain = {row["batch"]: row for row in of(rows, "engine") if row.get("status") == "ok" and "batch" in row}
    lines = [
        "## Engine in each quantisation",
        "",
        "As above. `ratio`: output tokens/s over those of 16-bit weights.",
        "",
        "| mode | batch | weights, GiB | tokens/s | ratio | TTFT p50, max, ms | TPOT p50, max, ms | step, ms | floor, ms "
        "| / floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in modes:
        head = f"| {row['quant_type']} | {row['batch']} |"
        if row["status"] != "ok":
            lines.append(f"{head} {row['status']} | | | | | | | |")
            continue
        same = plain.get(row["batch"])
        ratio = "" if same is None else f"{row['tokens_per_second'] / same['tokens_per_second']:.2f}x"
        own = " | ".join(_figure(row.get(key)) for key in ("step_p50_ms", "floor_ms", "tpot_over_floor"))
        lines.append(
            f"{head} {row['weight_bytes'] / 2**30:.2f} | {row['tokens_per_second']:.0f} | {ratio} | "
            f"{row['ttft_p50_ms']:.1f}, {row['ttft_max_ms']:.1f} | {row['tpot_p50_ms']:.2f}, {row['tpot_max_ms']:.2f} | {own} |"
        )
    return [*lines, ""]


def _vlm(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = [
        "## Vision-language model",
        "",
        "One picture a request, prepared before. `prepare`: from a JPEG file to patches, on one core of the host.",
        "",
        "| conc. | requests | image tokens | requests/s | TTFT p50, max, ms | TPOT p50, ms | prepare p50, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['batch']} | {row['status']} | | | | | |")
            continue
        lines.append(
            f"| {row['batch']} | {row['requests']} | {row['image_tokens']} | {row['requests_per_second']:.1f} | "
            f"{row['ttft_p50_ms']:.1f}, {row['ttft_max_ms']:.1f} | {row['tpot_p50_ms']:.2f} | {row['prepare_p50_ms']:.1f} |"
        )
    return [*lines, ""]


def _demo(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "equal" in row:
            shortest = min(row["common_tokens"])
            equal = f"{row['equal']} of {row['answers']} greedy answers equal the CPU's"
            lines.append(f"- float32: {equal}; the first {shortest} tokens of all do.")
        for level in row.get("levels", ()):
            lines.append(
                f"- bfloat16, {level['concurrency']} at once: {level['tokens_per_second']:.0f} tokens/s, "
                f"TTFT {level['ttft_p50'] * 1e3:.0f} ms, TPOT {level['tpot_p50'] * 1e3:.2f} ms"
            )
    return ["## Demo model over HTTP", "", *lines, ""] if lines else []


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
