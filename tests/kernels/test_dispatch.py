"""Which path tensors take, and that the CPU path stands without Triton."""

import ast
from pathlib import Path

import pytest
import torch

import dashinfer_kernels
from dashinfer_kernels import dispatch

SOURCES = sorted(path for path in Path(dashinfer_kernels.__file__).parent.rglob("*.py") if not path.stem.startswith("kernel"))


def imported_at_once(tree: ast.Module) -> list[str]:
    """Dotted names of what a module's own import statements name, those in functions left out."""
    inner = {node for call in ast.walk(tree) if isinstance(call, ast.FunctionDef) for node in ast.walk(call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in inner:
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node not in inner:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_only_launches_import_triton(path: Path) -> None:
    names = imported_at_once(ast.parse(path.read_text(encoding="utf-8")))

    assert [name for name in names if name.split(".")[-1].startswith("kernel") or name.split(".")[0] == "triton"] == []


def test_an_early_import_is_seen() -> None:
    source = "import triton\nfrom dashinfer_kernels.norm import kernel\ndef f():\n    import triton.language\n"

    assert imported_at_once(ast.parse(source)) == ["triton", "dashinfer_kernels.norm.kernel"]


def test_cpu_tensors_take_the_cpu_path() -> None:
    assert not dispatch.use_triton(torch.empty(1))


def test_tests_may_send_them_the_other_way(triton_path: str) -> None:
    assert dispatch.use_triton(torch.empty(1, device=triton_path))
