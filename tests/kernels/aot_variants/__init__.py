"""Kernel variants that are compiled ahead of time, a module an op.

A module lists them in `VARIANTS`: few, those that real models launch. Names of kernels are strings, so that listing variants
imports no kernel.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as its launch would make it.

    Pointers are taken as aligned to 16 bytes. Arguments that are 1 at launch belong in `constants`: Triton makes them that.
    """

    name: str
    kernel: str  # "norm.kernel:rms_norm_kernel", below dashinfer_kernels
    signature: dict[str, str]  # "*bf16", "i32", "fp32", "tensordesc<bf16[64,64]>"; "i32:16" for a multiple of 16
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # further options of the compiler
    targets: tuple[str, ...] = TARGETS
    instructions: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # a target's: regular expressions its code must match
    max_registers: int | None = None  # a thread, on sm_80 and sm_90


def load() -> dict[str, Variant]:
    """All variants by name."""
    found: dict[str, Variant] = {}
    for module in pkgutil.iter_modules(__path__):
        for variant in importlib.import_module(f"{__name__}.{module.name}").VARIANTS:
            assert variant.name not in found, variant.name
            found[variant.name] = variant
    return found
