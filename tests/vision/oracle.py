"""transformers' own processors. Its video processors need torchvision, which they only resize and normalise with."""

import importlib
import sys
import types
import warnings
from functools import cache

import numpy as np
import pytest


@cache
def image_module() -> types.ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")


def oracle(settings: dict, images: list) -> tuple[np.ndarray, np.ndarray]:
    """Settings and images to pixel_values float32 and image_grid_thw of transformers' Pillow image processor."""
    result = image_module().Qwen2VLImageProcessorPil(**settings)(images=images, return_tensors="np")
    return result["pixel_values"], result["image_grid_thw"]


@cache
def video_module(family: str) -> types.ModuleType:
    """The video processor's module of `qwen2_vl` or `qwen3_vl`; while it loads, empty modules take torchvision's place."""
    image_module()
    pytest.importorskip("transformers.video_processing_utils")
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional"]
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
    try:
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")
    finally:
        for name in absent:
            del sys.modules[name]
