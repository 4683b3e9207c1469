"""The file that `dashinfer_kernels.tuning` reads."""

import json
from collections.abc import Iterable
from pathlib import Path

from bench.tune.search import Found


def write(path: Path, found: Iterable[Found]) -> None:
    """Put what was found into a table: keys that have a config now, without those that the heuristic serves better; other
    entries stay."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for each in found:
        entries = [entry for entry in table.get(each.op, []) if entry["key"] != list(each.key)]
        if each.config is not None:
            entries.append({"key": list(each.key), "config": each.config, "gain": round(each.gain, 3)})
        table[each.op] = sorted(entries, key=lambda entry: list(map(str, entry["key"])))
    lines = [f" {json.dumps(op)}: [{_entries(table[op])}]" for op in sorted(table) if table[op]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _entries(entries: list[dict[str, object]]) -> str:
    return "\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n "
