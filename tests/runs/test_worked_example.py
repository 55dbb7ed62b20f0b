"""docs/worked-example.md: its data are what it says, and its commands work.

All commands, with few steps: `QWLIT_LONG=1 pytest tests/runs/test_worked_example.py`. Where pypinyin is not installed,
words made here take the place of its own.
"""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from qwlit.config.compose import compose
from tests.long import LONG
from tests.runs.runs import in_this_process, qwlit

PAGE = (Path(__file__).parents[2] / "docs" / "worked-example.md").read_text("utf-8")
COMMANDS = re.findall(r"^qwlit (.+)$", PAGE, re.M)
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
CHARACTERS = [chr(0x4E00 + n) for n in range(32)]
STAND_IN = {a + b: [[f"a{ord(a) % 32}"], [f"b{ord(b) % 7}"]] for a, b in product(CHARACTERS, CHARACTERS)}
FEWER = {
    "train": ["train.max_steps=4", "scheduler.warmup_steps=1"],
    "generate": [],
    "inspect": [],
    "plan": [],
    "report": [],
}


@pytest.fixture
def data(tmp_path):
    """Run the page's script; return its folder."""
    if find_spec("pypinyin") is None:
        (tmp_path / "pypinyin").mkdir()
        (tmp_path / "pypinyin" / "phrases_dict.py").write_text(f"phrases_dict = {STAND_IN!r}\n", encoding="utf-8")
    (tmp_path / "data.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "data.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if find_spec("pypinyin"):
        assert done.stdout.strip() in PAGE
    return tmp_path


@pytest.mark.parametrize("words", [words for words in COMMANDS if words.startswith("train")])
def test_the_trainings_shown_compose(words):
    compose(shlex.split(words)[1:])


def test_the_rows_are_read_as_shown(data):
    done = qwlit(["inspect", "model=demo", "data.path=chat.jsonl", "data.val_path=chat-val.jsonl", "sample=0"], data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("supervised") < done.stdout.index("<think>") < done.stdout.index("<|im_end|>]]")


@pytest.mark.skipif(not LONG, reason="QWLIT_LONG=1: two minutes")
def test_every_command_works(data, monkeypatch):
    monkeypatch.setattr("qwlit.inference.proof.run_plainly", in_this_process)
    monkeypatch.setattr("qwlit.inference.plain_proof.imports_qwlit", lambda: False)
    for command in COMMANDS:
        name, *words = shlex.split(re.sub(r"prompts=\d+", "prompts=4", command))
        more = FEWER.get(name, [])
        if name == "sweep":
            more = ["train.max_steps=20", "data.max_samples=100"]
        done = qwlit([name, *words, *more], data)
        refused = "preflight" in done.stdout and name == "plan"
        assert done.returncode == 0 or refused, (command, done.stdout, done.stderr)
    assert len(COMMANDS) >= 11
