"""QWLIT_LONG=1: the lowest versions that pyproject.toml allows of what changes most, beside the same torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from tests.long import LONG

ROOT = Path(__file__).parents[2]
PACKAGES = ("lightning", "transformers")


def lowest(package: str) -> Version:
    return Version(re.search(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())[1])


def pinned(package: str) -> Version:
    return Version(re.search(rf"(?m)^{package}==(\S+)", (ROOT / "constraints.txt").read_text())[1])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_version_older_than_the_tested_ones_is_allowed(package):
    """Where the pin is newer than the lowest version, the test below runs the lowest."""
    assert lowest(package) <= pinned(package)


@pytest.mark.skipif(not LONG, reason="QWLIT_LONG=1 runs it")
def test_unit_and_parity_tests_pass_with_the_lowest_versions(tmp_path):
    if all(lowest(package) == pinned(package) for package in PACKAGES):
        pytest.skip("constraints.txt pins the lowest versions, so every run of the tests is with them")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    free = "".join(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
        if not line.startswith(tuple(f"{package}==" for package in (*PACKAGES, "pytorch-lightning", "huggingface")))
    )
    (tmp_path / "constraints.txt").write_text(free + "".join(f"{p}=={lowest(p)}\n" for p in PACKAGES))
    install = [python, "-m", "pip", "install", "--quiet", "-c", tmp_path / "constraints.txt", "-e", f"{ROOT}[dev]"]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "2", "tests/unit", "tests/parity"], cwd=ROOT, check=False
    )
    assert done.returncode == 0
