"""Which cores and how many threads a process among several computes with; no thread is moved here."""

from pathlib import Path

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
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
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


@pytest.mark.parametrize(
    ("quota", "count", "asked", "num_threads"),
    [
        (2.5, 1, None, [2]),
        (0.5, 1, None, [1]),
        (8.0, 1, None, []),
        (6.0, 2, None, [3]),
        (16.0, 2, None, [4]),
        (2.5, 1, "8", []),
    ],
)
def test_no_more_threads_than_there_is_time_for(
    quota: float, count: int, asked: str | None, num_threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    record: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "_cores", list(range(8)))
    monkeypatch.setattr(threads.os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", record.append)

    share_cores(0, count)

    assert record == num_threads


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu.max": "max 100000\n"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2.0),
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "50000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("3:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("3:cpu:/of/the/host\n0::/", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("nonsense\n0::/../x", {"cpu.max": "what ever more"}, None),
    ],
)
def test_quotas_of_control_groups(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)

    assert threads.cpu_quota(tmp_path / "groups", tmp_path / "root") == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert threads.cpu_quota(tmp_path / "nothing", tmp_path) is None
