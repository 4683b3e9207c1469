"""Sums over processes in shared memory have the bits of torch's, however late ranks come, and a killed rank is noticed."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker.memory_ranks import ROUNDS, SILENCE, SIZES, TICK, WORLD_SIZE

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="gloo sums where stores may change places"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """What each rank found; the second is killed in the end."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-m", "tests.worker.memory_ranks", str(rank), str(folder)], env=environment)
        for rank in range(WORLD_SIZE)
    ]
    try:
        for number, rank in enumerate(ranks):
            assert rank.wait(timeout=120) == (-signal.SIGKILL if number == 1 else 0)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return {rank: json.loads((folder / str(rank)).read_text()) for rank in range(WORLD_SIZE)}


@pytest.mark.parametrize("size", [2, 4])
def test_operations_are_exact(size: int, found) -> None:
    for each in found.values():
        assert each[f"sums {size}"] == [True] * len(SIZES)
        assert each[f"bfloat16 {size}"]
        assert each[f"gathers {size}"] == [True] * 3
        assert each[f"broadcasts {size}"] == [True] * 2


@pytest.mark.parametrize("size", [2, 4])
def test_thousands_in_a_row_are_exact_though_ranks_come_and_read_late(size: int, found) -> None:
    assert [each[f"rounds {size}"] for each in found.values()] == [ROUNDS] * len(found)


def test_a_rank_that_cannot_share_has_all_go_without(found) -> None:
    assert all(each["none"] for each in found.values())


def test_a_rank_that_waits_leaves_others_the_interpreter_and_the_core(found) -> None:
    assert found[0]["ticks"] > SILENCE / TICK / 3
    assert found[0]["busy"] < SILENCE / 3


def test_a_killed_rank_is_noticed(found) -> None:
    assert found[0]["lost"] == "another rank is gone: rank 1 has ended"
