"""Compiles kernel variants for GPUs that need not be here, and reads what the compilers say of them.

`compile_all` works in processes of its own: in the tests' process Triton may be interpreting. Triton keeps compiled kernels
on disk by the hash of their source. As a script it prints a table: `python tests/kernels/aot.py [WORD...]`, of variants whose
names contain one of the words.
"""

import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aot_variants
from aot_variants import Variant

SHARED_MEMORY = {  # bytes a program may have
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class Compiled:
    """What the compilers say. `text` is PTX or, for AMD, assembly."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    text: str


def compile_all(jobs: Iterable[tuple[str, str]], processes: int = 2) -> dict[tuple[str, str], "Compiled | str"]:
    """Compile each (name of the variant, target); a compiler's error stands in for what it failed on."""
    jobs = list(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(processes, len(jobs))), mp_context=context) as pool:
        return dict(zip(jobs, pool.map(_attempt, jobs), strict=True))


def _attempt(job: tuple[str, str]) -> "Compiled | str":
    name, target = job
    try:
        return compile_variant(aot_variants.load()[name], target)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile for one of `aot_variants.TARGETS`, in this process.

    Raises:
        Exception: whatever Triton raises when it cannot.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = variant.kernel.partition(":")
    kernel = getattr(importlib.import_module(f"dashinfer_kernels.{module}"), function)
    assert isinstance(kernel, triton.JITFunction), f"{variant.kernel} is not compiled here"
    types = {name: kind.removesuffix(":16") for name, kind in variant.signature.items()}
    aligned = [name for name, kind in variant.signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(variant.constants),
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    unknown = (set(types) | set(variant.constants)) ^ set(kernel.arg_names)
    assert not unknown, f"arguments of {variant.kernel} do not agree: {sorted(unknown)}"
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    compiled = triton.compile(source, target=gpu, options=options)
    if gpu.backend == "cuda":
        registers, spilled = _cuda_resources(compiled.asm["cubin"])
        return Compiled(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])
    text = compiled.asm["amdgcn"]
    registers, spilled = _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return Compiled(registers, spilled, compiled.metadata.shared, text)


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory a thread."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in what the compiler printed"
    return int(match[1])


def faults(variant: Variant, target: str, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled variant, one line each."""
    found = []
    if compiled.spilled:
        found.append(f"{compiled.spilled} bytes of registers are spilled")
    if compiled.shared > SHARED_MEMORY[target]:
        found.append(f"{compiled.shared} bytes of shared memory, {target} has {SHARED_MEMORY[target]}")
    if variant.max_registers and target.startswith("sm_") and compiled.registers > variant.max_registers:
        found.append(f"{compiled.registers} registers, {variant.max_registers} allowed")
    for pattern in variant.instructions.get(target, ()):
        if not re.search(pattern, compiled.text):
            found.append(f"no instruction matches {pattern}")
    return found


def main(words: list[str]) -> int:
    variants = {n: v for n, v in aot_variants.load().items() if not words or any(word in n for word in words)}
    results = compile_all((name, target) for name, variant in variants.items() for target in variant.targets)
    for (name, target), compiled in results.items():
        if isinstance(compiled, str):
            print(f"{name:40} {target:7} {compiled}")
            continue
        usage = f"{compiled.registers:4} registers {compiled.spilled:4} spilled {compiled.shared:7} shared"
        print(f"{name:40} {target:7} {usage}  {'; '.join(faults(variants[name], target, compiled))}")
    return int(any(isinstance(c, str) or faults(variants[n], t, c) for (n, t), c in results.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
