"""The house: floors, packaging, and which YAML owns which key."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


CHECKS = ["lint-imports --no-cache", "ruff check --no-cache .", "ruff format --no-cache --check .", "mypy"]


@pytest.mark.parametrize("check", CHECKS)
def test_floors_style_and_types_are_kept(check):
    tool, *words = check.split()
    command = [str(Path(sys.executable).parent / tool), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def keys(tree: dict, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def test_no_key_is_set_by_both_a_recipe_and_a_hardware_profile():
    recipes = {
        k for f in (CONF / "recipe").glob("*.yaml") for k in keys(yaml.safe_load(f.read_text())) if k != "defaults"
    }
    profiles = {
        f"hardware.{k}" for f in (CONF / "hardware").glob("*.yaml") for k in keys(yaml.safe_load(f.read_text()))
    }
    assert recipes and profiles
    assert not recipes & profiles


@pytest.mark.parametrize("file", sorted(CONF.glob("*/**/*.yaml")), ids=lambda f: str(f.relative_to(CONF)))
def test_a_yaml_file_is_at_most_20_lines(file):
    assert len(file.read_text().splitlines()) <= 20
