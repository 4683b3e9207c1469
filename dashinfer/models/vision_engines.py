"""Which library runs the vision tower: our own kernels, transformers or TensorRT."""

import logging
from importlib import import_module

import torch

from dashinfer.errors import ConfigurationError
from dashinfer.types import VisionEngine

logger = logging.getLogger("dashinfer.models")


def choose_vision_engine(requested: VisionEngine | None, device: torch.device) -> VisionEngine:
    """What runs the tower on `device`; without a request TensorRT, and native with a line in the log where that cannot be.

    Raises:
        ConfigurationError: what is requested cannot be; the message says what to install.
    """
    if requested == "native":
        return "native"
    if requested == "transformers":
        if missing := _missing("transformers"):
            raise ConfigurationError(f'--vision-engine transformers: {missing}; pip install "dashinfer[vlm]"')
        return "transformers"
    if device.type != "cuda" or torch.version.hip is not None:
        why = "TensorRT needs an NVIDIA GPU"
    elif missing := _missing("tensorrt", "onnx"):
        why = f'{missing}; pip install "dashinfer[tensorrt]"'
    else:
        return "tensorrt"
    if requested is not None:
        raise ConfigurationError(f"--vision-engine tensorrt: {why}, or use --vision-engine native")
    logger.info("vision engine: native (%s)", why)
    return "native"


def _missing(*packages: str) -> str:
    """Why one of the packages cannot be used; empty: they can."""
    for package in packages:
        try:
            import_module(package)
        except (ImportError, OSError) as error:  # a library of the system may be missing, or of another version
            return f"the package {package} cannot be imported: {error}"
    return ""
