"""The wheel carries all that a run needs and works outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's content, as an installer would lay it out."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_settings_and_the_demo_are_inside(site):
    inside = {str(p.relative_to(site)) for p in site.rglob("*") if p.is_file()}
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"qwlit/conf/{file.relative_to(ROOT / 'conf')}" in inside
    assert {
        "qwlit/resources/report.html.jinja",
        "qwlit/resources/other_trainers.yaml",
        "qwlit/resources/demo/train.jsonl",
        "qwlit/resources/demo/tokenizer/tokenizer.json",
    } <= inside
    assert not any(name.startswith(("tests", "conf")) for name in inside)


def test_it_trains_outside_the_checkout(site, tmp_path):
    words = ["train", "experiment=demo", "train.max_steps=2", "data.exact_match=3", "validation.every_steps=2"]
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = f"import qwlit; assert qwlit.__file__.startswith({str(site)!r}), qwlit.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "qwlit", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "where the files are" in done.stdout and (tmp_path / "runs/demo/export/config.json").exists()
