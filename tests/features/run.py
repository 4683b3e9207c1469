"""What a test run proved, as it is kept in a file. Knows nothing of pytest, and nothing of rows that no test is marked with."""

from pathlib import Path

import msgspec


class Proof(msgspec.Struct, kw_only=True):
    """How the tests of a feature ended. Those that ran on a GPU are counted apart."""

    area: str
    feature: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    needs_gpu: int = 0  # of those skipped
    passed_on_gpu: int = 0
    failed_on_gpu: int = 0


class Run(msgspec.Struct, kw_only=True):
    """A whole run or any part of one.

    `variants` has the kernel variants that were compiled: name -> target -> "passed", "failed" or "skipped".
    """

    gpu: str | None = None  # its name; None where no test ran on one
    features: list[Proof] = []
    variants: dict[str, dict[str, str]] = {}


def read(path: Path) -> Run:
    """
    Raises:
        OSError: there is no such file.
        ValueError: it is no run's.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Run, strict=True)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no file of --features: {error}") from None


def write(run: Run, path: Path) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def stored_gpu_runs(root: Path) -> list[Run]:
    """Those that `bench.gpu` left below the repository's root."""
    return [read(path) for path in sorted((root / "bench" / "results").glob("gpu-*.features.json"))]
