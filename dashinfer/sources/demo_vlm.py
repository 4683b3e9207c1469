"""`--model demo-vlm`: a small model that sees, which the package carries, for a first try without network or GPU.

Qwen2-VL's architecture, trained on synthetic pictures by `bench/demo_vlm`; it knows coloured shapes and nothing else.
"""

from pathlib import Path

from dashinfer.sources import ModelSource, ReportProgress
from dashinfer.sources.local import resolve_directory

DIRECTORY = Path(__file__).parents[1] / "demo_vlm"


def resolve_demo_vlm(*, load_format: str, report: ReportProgress) -> ModelSource:
    """Raises ModelNotFound where the package was installed without its data."""
    return resolve_directory(DIRECTORY, load_format=load_format, report=report, name="demo-vlm")
