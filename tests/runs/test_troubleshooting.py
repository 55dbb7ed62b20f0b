"""docs/troubleshooting.md quotes messages that qwlit has, and what it says to type works.

The commands that train: `QWLIT_LONG=1 pytest tests/runs/test_troubleshooting.py`.
"""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qwlit.config.compose import compose
from tests.long import LONG
from tests.runs.runs import DEMO, in_this_process, qwlit, train

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
SPANS = [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))]
COMMANDS = [span for span in SPANS if re.match(r"qwlit \w+ ", span)] + re.findall(r"^qwlit .+", PAGE, re.M)
OVERRIDES = [span for span in SPANS if all(re.fullmatch(r"[a-z_.]+=[^…\s]+", word) for word in span.split())]
SHELL = ('"', "qwlit", "hf", "wandb", "unset", "export", "OMP_NUM_THREADS")
MESSAGES = [span for span in SPANS if " " in span and not span.startswith(SHELL) and span not in OVERRIDES]
SHORTER = {
    "train": ["train.max_steps=2", "data.exact_match=0"],
    "generate": ["generation.max_new_tokens=4"],
    "verify": ["steps=2", "repeats=2"],
    "sweep": ["train.max_steps=20", "run.overwrite=true", "data.max_samples=40", "data.exact_match=0"],
}
TRAIN = ("sweep", "verify")


def texts_of_the_source() -> list[str]:
    """Every text in the source, … in place of what an f-string fills in."""
    found = []
    for file in (ROOT / "src" / "qwlit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_quoted_is_one_that_qwlit_prints():
    source = texts_of_the_source()
    patterns = {text: ".*".join(map(re.escape, text.split("…"))) for text in MESSAGES}
    missing = [text for text, pattern in patterns.items() if not any(re.search(pattern, each, re.S) for each in source)]
    assert missing == [] and len(MESSAGES) >= 35


@pytest.mark.parametrize("words", dict.fromkeys(OVERRIDES))
def test_the_overrides_compose(words):
    base = ["model.path=FOLDER", "data.path=chat.jsonl", "recipe=lora"]
    compose([*base[: 2 if "recipe=" in words or "adapter." in words or "freeze." in words else 3], *words.split()])


def test_the_commands_run(tmp_path, monkeypatch):
    rows = (DEMO / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "chat.jsonl").write_text("".join(rows[:120]), encoding="utf-8")
    words = ["experiment=demo", "run.name=NAME", "train.max_steps=6", "checkpoint.every_steps=5", "data.exact_match=0"]
    train([*words, "trace.every_steps=1"], tmp_path)
    shutil.copytree(tmp_path / "runs" / "NAME", tmp_path / "runs" / "OTHER", symlinks=True)
    (tmp_path / "FOLDER").symlink_to(tmp_path / "runs" / "NAME" / "export")
    monkeypatch.setattr("qwlit.inference.proof.run_plainly", in_this_process)
    monkeypatch.setattr("qwlit.inference.plain_proof.imports_qwlit", lambda: False)
    for command in dict.fromkeys(COMMANDS):
        words = shlex.split(command)[1:]
        if not LONG and (words[0] in TRAIN or "seed" in command):
            continue
        done = qwlit([*words, *SHORTER.get(words[0], [])], tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert len(COMMANDS) >= 15
