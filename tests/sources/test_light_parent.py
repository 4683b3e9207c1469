"""The parent process must stay small: it may never import what the workers need."""

import subprocess
import sys

import pytest

from dashinfer.errors import ModelNotFound
from dashinfer.sources import ReportProgress, demo
from dashinfer.sources.gguf import resolve_gguf
from dashinfer.text.tokenizer import Tokenizer

SCRIPT = """
import pkgutil, importlib, sys
for name in ("dashinfer.sources", "dashinfer.text", "dashinfer.protocol"):
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__, name + "."):
        if module.name != "dashinfer.sources.package_index":
            importlib.import_module(module.name)
import dashinfer.models.config
heavy = {"torch", "transformers", "numpy", "gguf", "huggingface_hub", "urllib.request", "trio", "quart"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_no_heavy_imports() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


# Made once with the model's tokeniser in transformers.
GOLDEN = {
    "What is the capital of France?": [1780, 314, 260, 3575, 282, 4649, 47],
    "<|im_start|>user\nñandú 你好 🙂<|im_end|>\n": [
        1,
        4093,
        198,
        10214,
        397,
        16148,
        216,
        18645,
        250,
        48392,
        138,
        47526,
        2,
        198,
    ],
    "  two  spaces\n\n\tand words": [216, 827, 216, 5600, 1116, 197, 397, 1924],
    "In 1234 and 5.6, x1": [788, 216, 33, 34, 35, 36, 284, 216, 37, 30, 38, 28, 1792, 33],
    # Digits stand alone, and spaces before them are one word: not what transformers makes of the file, which forgets that.
    "a  7": [81, 256, 39],
}


@pytest.fixture
def demo_tokenizer(report: ReportProgress, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.delenv("DASHINFER_CACHE")  # the user's own: the model is 98 MB
    try:
        path = demo.demo_file(report=report)
    except ModelNotFound as error:
        pytest.skip(str(error))
    return Tokenizer.from_source(resolve_gguf(path, report=report))


def test_the_demo_models_tokeniser(demo_tokenizer: Tokenizer) -> None:
    assert {text: demo_tokenizer.encode(text) for text in GOLDEN} == GOLDEN
