"""Imports run one way, as README's "How it works" draws them. Read from the sources; nothing is imported here.

The parent process (HTTP, text, scheduling) never loads torch; workers never load the web stack. A module belongs to the layer
with the longest matching name, and may import its own layer and what lies below on its side.
"""

import ast
import itertools
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT, ROOT / "kernels")

SHARED = [
    *(
        "dashinfer",
        "dashinfer.errors",
        "dashinfer.types",
        "dashinfer.setting_values",
        "dashinfer.config",
        "dashinfer.gguf_header",
    ),
    *("dashinfer.worker", "dashinfer.worker.frames", "dashinfer.worker.template"),
    *("dashinfer.sources", "dashinfer.sources.cache"),
    # A model's shape needs no torch, so the parent refuses what cannot be served before its weights are fetched.
    *("dashinfer.models", "dashinfer.models.config", "dashinfer.models.rope_config", "dashinfer.models.vision_config"),
    *("dashinfer.models.quantized_config", "dashinfer.models.quantized_values", "dashinfer.models.scaled_config"),
]
# From the bottom to the top; names in one set are one layer, and may import each other.
PARENT: list[set[str]] = [
    {"dashinfer", "dashinfer.errors"},
    {"dashinfer.types", "dashinfer.setting_values"},
    {"dashinfer.config", "dashinfer.gguf_header"},
    {"dashinfer.models"},
    {
        "dashinfer.sources",
        "dashinfer.protocol",
        "dashinfer.text",
        "dashinfer.guidance",
        "dashinfer.vision",
        "dashinfer.engine",
        "dashinfer.engine.api",
        "dashinfer.engine.blocks",
        "dashinfer.engine.pace",
        "dashinfer.engine.routing",
        "dashinfer.engine.sequence",
        "dashinfer.engine.scheduler",
    },
    {"dashinfer.worker", "dashinfer.worker.frames", "dashinfer.worker.processes", "dashinfer.worker.supervisor"},
    {"dashinfer.engine.engine", "dashinfer.engine.replicas", "dashinfer.cluster"},
    {"dashinfer.serving"},
]
CHILD: list[set[str]] = [
    {
        "dashinfer",
        "dashinfer.errors",
        "dashinfer.types",
        "dashinfer.setting_values",
        "dashinfer.config",
        "dashinfer.gguf_header",
    },
    {"dashinfer.sources", "dashinfer.sources.cache"},
    {"dashinfer_kernels"},
    {"dashinfer.models"},
    {"dashinfer.worker"},  # all of it but processes and supervisor, which are the parent's
]
# `dashinfer_bench` is a process of its own, which knows servers by their URL alone.
BENCH: list[set[str]] = [{"dashinfer", "dashinfer.errors"}, {"dashinfer.bench"}]
PARENT_NEVER = {"torch", "triton", "transformers", "accelerate", "dashinfer_kernels"}
CHILD_NEVER = {"trio", "quart", "quart_trio", "hypercorn", "pydantic", "httpx"}
BENCH_NEVER = PARENT_NEVER | CHILD_NEVER - {"trio"} | {"numpy", "msgspec"}


def sources() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for folder, package in zip(FOLDERS, ("dashinfer", "dashinfer_kernels"), strict=True):
        for path in (folder / package).rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def imports(name: str, path: Path) -> Iterator[str]:
    """Dotted names that a module imports, at whatever depth; of `from a import b` the module `a.b` if it is one, else `a`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in SOURCES else base


def layer(name: str, side: list[set[str]]) -> int:
    """The layer's number, by the longest of the side's names that `name` is or lies in; -1 if there is none."""
    matches = [
        (len(known), number)
        for number, names in enumerate(side)
        for known in names
        if name == known or name.startswith(known + ".")
    ]
    # `dashinfer` stands for its own __init__ alone
    matches = [(length, number) for length, number in matches if length > len("dashinfer") or name == "dashinfer"]
    return max(matches)[1] if matches else -1


def sides(name: str) -> list[tuple[str, list[set[str]], set[str]]]:
    """The processes that a module runs in, with the layers and the forbidden packages of each."""
    parent, child = ("parent", PARENT, PARENT_NEVER), ("child", CHILD, CHILD_NEVER)
    bench = ("bench client", BENCH, BENCH_NEVER)
    if name in ("dashinfer", "dashinfer.errors"):
        return [parent, child, bench]
    if name == "dashinfer.bench" or name.startswith("dashinfer.bench."):
        return [bench]
    if name in SHARED:
        return [parent, child]
    if name.startswith(("dashinfer_kernels", "dashinfer.models")):
        return [child]
    if name.startswith("dashinfer.worker."):
        return [parent] if name in ("dashinfer.worker.processes", "dashinfer.worker.supervisor") else [child]
    return [parent]


def offences(name: str, path: Path) -> list[str]:
    """What a module imports that it must not, one line each."""
    found = []
    for process, side, never in sides(name):
        own = layer(name, side)
        if own < 0:
            found.append(f"{name} is in no layer of the {process}")
        for target in imports(name, path):
            if target.split(".")[0] in never:
                found.append(f"{name} runs in the {process} and imports {target}")
            elif target in SOURCES:
                if process not in [other for other, _, _ in sides(target)]:
                    found.append(f"{name} runs in the {process} and imports {target}, which does not")
                elif layer(target, side) > own:
                    found.append(f"{name} imports {target}, which lies above it in the {process}")
    return found


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_run_one_way(name: str) -> None:
    assert offences(name, SOURCES[name]) == []


def test_modules_import_names_that_exist() -> None:
    missing = [
        f"{name} imports {target}"
        for name, path in SOURCES.items()
        for target in imports(name, path)
        if target.split(".")[0] in ("dashinfer", "dashinfer_kernels") and target not in SOURCES
    ]

    assert missing == []


@pytest.mark.parametrize(
    ("name", "line", "offence"),
    [
        ("dashinfer.serving.app", "import torch", "runs in the parent and imports torch"),
        ("dashinfer.serving.app", "def f():\n    from transformers import AutoTokenizer", "imports transformers"),
        (
            "dashinfer.engine.scheduler",
            "from dashinfer.models.decoder import x",
            "imports dashinfer.models.decoder, which does not",
        ),
        ("dashinfer.models.config", "import torch", "runs in the parent and imports torch"),
        ("dashinfer.vision.decode", "def f():\n    import torch", "runs in the parent and imports torch"),
        ("dashinfer.vision.video", "from dashinfer.serving import app", "imports dashinfer.serving.app, which lies above it"),
        ("dashinfer.worker.runner", "import trio", "runs in the child and imports trio"),
        ("dashinfer.worker.runner", "from dashinfer import serving", "imports dashinfer.serving, which does not"),
        ("dashinfer.errors", "from . import types", "imports dashinfer.types, which lies above it"),
        ("dashinfer.types", "from dashinfer.config import x", "imports dashinfer.config, which lies above it in the parent"),
        ("dashinfer.models.llama", "from ..worker import x", "imports dashinfer.worker, which lies above it"),
        ("dashinfer.vision.fetch", "import torch", "runs in the parent and imports torch"),
        ("dashinfer.vision.fetch", "from dashinfer.serving import app", "imports dashinfer.serving.app, which lies above it"),
        ("dashinfer.telemetry", "", "is in no layer of the parent"),
        ("dashinfer.bench.client", "import torch", "runs in the bench client and imports torch"),
        ("dashinfer.bench.stats", "import numpy", "runs in the bench client and imports numpy"),
        ("dashinfer.bench.client", "from dashinfer.types import x", "imports dashinfer.types, which does not"),
        ("dashinfer.serving.app", "from dashinfer.bench import stats", "imports dashinfer.bench.stats, which does not"),
    ],
)
def test_an_offence_is_seen(name: str, line: str, offence: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(line)

    assert any(offence in found for found in offences(name, path)), offences(name, path)


def test_what_is_right_is_no_offence(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import torch\nfrom dashinfer.models import x\nfrom dashinfer.types import Start\n")

    assert offences("dashinfer.worker.runner", path) == []


def test_the_name_kernels_is_left_to_others() -> None:
    """A package `kernels` at the root would be taken for the Hugging Face package that transformers looks for."""
    assert (ROOT / "kernels" / "dashinfer_kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_declared_packages_are_imported() -> None:
    """Everything that the product imports is a dependency or an extra of pyproject.toml, or Python's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    products = [extras[name] for name in ("serving", "vlm", "tensorrt", "otel", "bench")]
    requirements = [*project["dependencies"], *itertools.chain.from_iterable(products)]
    declared = {requirement.split(";")[0].split("[")[0].split("<")[0].split(">")[0].strip() for requirement in requirements}
    known = {name.lower().replace("-", "_") for name in declared}
    # Parts of those declared, or what they stand on.
    known |= {"pil", "quart", "werkzeug", "pydantic_core", "tqdm", "triton", "opentelemetry"}
    imported = {target.split(".")[0] for name, path in SOURCES.items() for target in imports(name, path)}
    foreign = imported - {"dashinfer", "dashinfer_kernels"} - set(sys.stdlib_module_names)

    assert {name for name in foreign if name.lower() not in known} == set()
