"""Files and chat templates that expand to much end in one line, within 500 MB and 30 s.

`QWLIT_LONG=1 pytest -n 0 -rA tests/faults/test_bombs.py` tries all of them and prints what each needs, else a sample.
"""

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.faults.bombs import DATA, GOOD, TEMPLATES, all_names, template_folder
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, interpreter

MOST_MIB, MOST_SECONDS = 500e6 / 2**20, 30
NAMES = list(all_names())
SAMPLE = [
    name for kind in ("data", "template") for name in random.Random(0).sample([n for n in NAMES if n[0] == kind], 3)
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a harmless tokenizer and a harmless file."""
    folder = tmp_path_factory.mktemp("plain")
    template_folder(folder / "tokenizer", "")
    (folder / "good.jsonl").write_bytes(GOOD + b"\n")
    return folder


def inspect(data: Path, tokenizer: Path, folder: Path) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Return what `inspect` said, the MiB that it added with all its processes, and the seconds that it took."""
    result = folder / "result.json"
    words = [f"data.path={data}", f"model.tokenizer={tokenizer}", "model.init=random", f"run.root={folder / 'runs'}"]
    command = [interpreter(), "-m", "tests.faults.measured", str(result), "inspect", *words]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    measured = json.loads(result.read_text())
    return done, measured["added"] + sum(measured["children"]), measured["seconds"]


def test_a_harmless_file_and_template_are_read(plain: Path, tmp_path: Path) -> None:
    done, added, _ = inspect(plain / "good.jsonl", plain / "tokenizer", tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 < added < MOST_MIB


@pytest.mark.parametrize(("kind", "name"), NAMES if LONG else SAMPLE)
def test_a_bomb_ends_in_one_line_within_its_limits(kind: str, name: str, plain: Path, tmp_path: Path) -> None:
    data, tokenizer = plain / "good.jsonl", plain / "tokenizer"
    if kind == "data":
        file, build = DATA[name]
        data = tmp_path / file
        build(data)
    else:
        tokenizer = tmp_path / "tokenizer"
        template_folder(tokenizer, TEMPLATES[name])
    done, added, seconds = inspect(data, tokenizer, tmp_path)
    print(f"{kind} | {name} | {added:.0f} MiB | {seconds:.1f} s | {done.returncode} | {done.stderr[:200]}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert added <= MOST_MIB
    if LONG:
        assert seconds <= MOST_SECONDS
