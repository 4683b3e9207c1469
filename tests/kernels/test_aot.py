"""Kernels compile for GPUs that are not here: no spills, shared memory that fits, the instructions that make them fast."""

import re

import aot
import aot_variants
import pytest
from aot import Compiled
from aot_variants import Variant

from tests.features.catalogue import CATALOGUE

pytest.importorskip("triton")
VARIANTS = aot_variants.load()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[tuple[str, str], "Compiled | str"]:
    """What this run's tests look at, compiled together."""
    jobs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    return aot.compile_all((call.params["name"], call.params["target"]) for call in jobs if call and "target" in call.params)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(name, target, marks=pytest.mark.compiles(name, target))
        for name in VARIANTS
        for target in VARIANTS[name].targets
    ],
)
def test_compiles_well(name: str, target: str, compiled: dict[tuple[str, str], "Compiled | str"]) -> None:
    result = compiled[name, target]

    assert isinstance(result, Compiled), result
    assert aot.faults(VARIANTS[name], target, result) == []


def test_the_table_of_features_names_kernels_that_there_are() -> None:
    named = {kernel for features in CATALOGUE.values() for feature in features for kernel in feature.kernels or ()}

    assert {kernel for kernel in named if not any(re.search(kernel, name) for name in VARIANTS)} == set()


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (Compiled(registers=64, spilled=8, shared=0, text="ld.v4"), "8 bytes of registers are spilled"),
        (Compiled(registers=64, spilled=0, shared=300_000, text="ld.v4"), "300000 bytes of shared memory, sm_90 has 232448"),
        (Compiled(registers=65, spilled=0, shared=0, text="ld.v4"), "65 registers, 64 allowed"),
        (Compiled(registers=64, spilled=0, shared=0, text="ld.v2"), "no instruction matches v4"),
    ],
)
def test_a_fault_is_seen(result: Compiled, fault: str) -> None:
    variant = Variant("x", "x:y", {}, {}, instructions={"sm_90": ("v4",)}, max_registers=64)

    assert aot.faults(variant, "sm_90", result) == [fault]


def test_errors_of_the_compiler_are_results() -> None:
    assert "KeyError" in aot._attempt(("no such variant", "sm_90"))
