"""`report` from the command line, on runs that were really trained."""

import json

import pytest

from tests.reports import assert_self_contained
from tests.runs.runs import DEMO, TINY, qwlit, summary, train

SHORT = [
    "data.val_fraction=0.2",
    "train.max_steps=6",
    "train.global_batch_size=4",
    "scheduler.warmup_steps=0",
    "validation.every_steps=3",
    "dropout=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with three runs: two rates, the higher in strict mode with answers, and one that the guard stopped."""
    folder = tmp_path_factory.mktemp("comparison")
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [f"data.path={folder / 'chat.jsonl'}", *SHORT]
    train([*words, "run.name=low", "optim.lr=1e-4"], folder)
    train([*words, "run.name=高", "optim.lr=3e-3", "determinism=strict", "data.exact_match=2"], folder)
    assert qwlit(["train", *TINY, *words, "run.name=wild", "optim.lr=1e30"], folder).returncode == 3
    return folder


def test_the_comparison_of_real_runs_says_what_differed_what_came_of_it_and_what_to_beware_of(folder):
    done = qwlit(["report", "runs=[runs/*]", "baseline=low"], folder)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    losses = {name: summary(folder / "runs" / name)["val_loss_best"] for name in ("low", "高")}
    assert losses["高"] < losses["low"]
    assert list(lines).index("高") < list(lines).index("low") < list(lines).index("wild")
    for text in ("★", "done", f"{losses['高']:.4f}", f"{losses['高'] - losses['low']:+.4f}", "0.003", "strict"):
        assert text in lines["高"], text
    assert "baseline" in lines["low"] and "1e-4" in lines["low"]
    assert "stopped by the guard at step" in lines["wild"] and "12 skipped, 3 rollbacks" in lines["wild"]
    assert "Determinism differs" in done.stdout and "validation sets differ" not in done.stdout
    assert done.stdout.rstrip().endswith("runs/report.html")


def test_json_of_real_runs_agrees_with_their_summaries(folder):
    done = qwlit(["report", "runs=[runs/low,runs/高]", "output=json"], folder)
    said = json.loads(done.stdout)
    assert {"optim.lr", "determinism"} <= set(said["differing"]) and "run.name" not in said["differing"]
    for run in said["runs"]:
        written = summary(folder / "runs" / run["name"])
        for entry, figure in (("val_loss_best", "val_loss"), ("train_loss_last", "train_loss"), ("steps", "steps")):
            assert run[figure] == written[entry]
        for figure in ("tokens_per_second", "peak_memory_gib", "wall_seconds"):
            assert run[figure] == written[figure]


def test_pages_of_real_runs_are_whole_and_load_nothing(folder):
    assert qwlit(["report", "runs=[runs/low,runs/高]"], folder).returncode == 0
    together = assert_self_contained((folder / "runs/report.html").read_text(encoding="utf-8"))
    assert "Curves" in together.text and "高" in together.text
    assert qwlit(["report", "runs=runs/高"], folder).returncode == 0
    alone = assert_self_contained((folder / "runs/高/report.html").read_text(encoding="utf-8"))
    assert "Plan and reality" in alone.text and "supervised tokens of a sample" in alone.text
    plan = json.loads((folder / "runs/高/manifest.json").read_text(encoding="utf-8"))["plan"]
    assert plan["steps"] == 6 and plan["tokens"] > 100 and plan["memory_gib"] > 0.5 and plan["seconds"] is None
    assert "Samples" in alone.text and "<|im_start|>" in alone.text and "eager" in alone.text


def test_another_validation_set_is_said_and_a_wrong_name_ends_in_one_line(folder):
    words = [f"data.path={folder / 'chat.jsonl'}", *SHORT, "optim.lr=1e-4", "data.val_fraction=0.4"]
    train([*words, "run.name=other"], folder)
    done = qwlit(["report", "runs=[runs/low,runs/other]"], folder)
    assert "validation sets differ" in done.stdout and "val_fraction" in done.stdout
    done = qwlit(["report", "runs=runs/lwo"], folder)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Did you mean 'low'?" in done.stderr
