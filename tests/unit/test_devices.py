"""The host memory that a process may use."""

import os
from pathlib import Path

import pytest

from qwlit.core.devices import host_memory

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)


def limited(tmp_path: Path, line: str, limits: dict[str, str]) -> int:
    own = tmp_path / "own"
    own.write_text(line)
    for file, limit in limits.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(limit)
    return host_memory(tmp_path, own)


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "1073741824\n"}, 2**30),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "2147483648\n"}, 2**31),
        ("0::/\n", {"memory.max": "max\n"}, PHYSICAL),
        ("5:cpu:/x\n4:memory,hugetlb:/a\n", {"memory/a/memory.limit_in_bytes": "1073741824\n"}, 2**30),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, PHYSICAL),
        ("", {}, PHYSICAL),
    ],
)
def test_the_smallest_limit_of_a_group_and_of_those_around_it_counts(tmp_path, line, limits, expected):
    assert limited(tmp_path, line, limits) == expected


def test_without_control_groups_the_machine_has_the_memory(tmp_path):
    assert host_memory(tmp_path, tmp_path / "none") == PHYSICAL


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "1024"}, 2**30),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "4"}, 2**31),
        ({"SLURM_MEM_PER_NODE": "0"}, PHYSICAL),
    ],
)
def test_memory_that_slurm_gives_a_job_is_a_limit(tmp_path, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert host_memory(tmp_path, tmp_path / "none") == expected
