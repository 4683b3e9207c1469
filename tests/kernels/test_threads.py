"""Which cores and how many threads a process among several computes with; no thread is moved here."""

import pytest
import torch

from dashinfer_kernels import share_cores, threads


@pytest.mark.parametrize(
    ("index", "count", "cores", "num_threads"),
    [
        (0, 1, None, None),  # everything is left as it is
        (0, 2, [0, 2], 2),
        (1, 2, [4, 6], 2),
        (4, 5, [8], 1),
        (3, 8, None, 1),  # fewer cores than processes
    ],
)
def test_processes_share_the_cores(index, count, cores, num_threads, monkeypatch: pytest.MonkeyPatch) -> None:
    record: dict = {}
    monkeypatch.setattr(threads, "_cores", [0, 2, 4, 6, 8])
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda _, cores: record.update(cores=cores), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: record.update(num_threads=number))

    share_cores(index, count)

    assert (cores, num_threads) == (record.get("cores"), record.get("num_threads"))


def test_no_more_threads_than_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    record: list[int] = []
    monkeypatch.setattr(threads, "_cores", list(range(8)))
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # OMP_NUM_THREADS
    monkeypatch.setattr(torch, "set_num_threads", record.append)

    share_cores(0, 2)

    assert record == [3]
