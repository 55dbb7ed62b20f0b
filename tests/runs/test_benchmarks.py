"""The benchmark's arms do the same work, and every part of the GPU's benchmark runs: tiny, and without a clock."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.determinism import compared
from benchmarks.gpu.page import PAGE, RESULTS, render, with_section
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.tables import COMPARED, INVALID, agreement
from benchmarks.gpu.train_once import Trained
from benchmarks.train import TOLERANCE, Measured, disagreement, run, verdict
from benchmarks.work import Case, prepare, tokens_of_steps
from tests.runs.runs import ENVIRONMENT, interpreter


@pytest.fixture
def warm(monkeypatch):
    """Processes that the benchmarks start have imported everything already."""
    monkeypatch.setattr(sys, "executable", interpreter())
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, ENVIRONMENT[name])


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.usefixtures("warm")
def test_qwlit_a_raw_loop_and_transformers_have_the_same_losses(adapter, tmp_path):
    case = Case("tiny", 300, 0.4, adapter=adapter, steps=4, mean_length=40.0, lr=1e-3)
    prepare(case, tmp_path)
    assert len(tokens_of_steps(tmp_path)) == case.steps
    losses = {}
    for arm in ("qwlit", "raw", "hf"):
        record, peak = run(arm, tmp_path)
        assert len(record["ends"]) == len(record["losses"]) == case.steps and peak > 0
        losses[arm] = record["losses"]
    assert losses["qwlit"][0] != losses["qwlit"][1]
    assert disagreement(losses["qwlit"], losses["raw"]) < TOLERANCE
    assert disagreement(losses["qwlit"], losses["hf"]) < TOLERANCE


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("warm")
def test_a_part_of_the_gpu_benchmark_runs_as_a_toy_and_says_of_every_row_what_was_compared(part, tmp_path):
    assert gpu.main([f"parts={part}", "size=toy", "device=cpu", f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / f"{part}.json").read_text())
    assert result["status"] == "done" and result["rows"]
    for row in result["rows"]:
        assert row[COMPARED] and not row[COMPARED].startswith((INVALID, "failed", "out of memory")), row
    assert result["machine"]["torch"] and "TF32" in result["settings"]
    page = render(tmp_path)
    assert f"#### {PARTS[part].title}" in page and "A toy" in page
    # An arm that is missing has its row.
    missing = {"full": "trl", "lora": "trl", "head": "cut_cross_entropy"}.get(part)
    if missing and find_spec(missing) is None:
        assert f"not installed: {missing}" in page


def test_a_part_that_takes_too_long_ends_with_all_its_processes_and_keeps_its_rows(tmp_path, monkeypatch):
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(f'#!/bin/sh\nsed -i "s/.rows.: ../\\"rows\\": [1]/" "$4"\nsleep 600 &\necho $! > {pid}\nwait\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    limits = {"device": "cpu", "size": "toy", "minutes": 1 / 60, "command": ""}
    assert "cut off" in gpu.run_part("head", tmp_path, **limits)
    result = json.loads((tmp_path / "head.json").read_text())
    assert "cut off" in result["status"] and result["rows"] == [1]
    stat = Path(f"/proc/{pid.read_text().strip()}/stat")
    # A process that has ended is a zombie until its new parent asks for it.
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_that_fails_fails_the_command_and_leaves_the_next_one_alone(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$3" != check ]\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert gpu.main(["parts=check,head", "size=toy", "device=cpu", f"out={tmp_path}"]) == 1
    ends = [json.loads((tmp_path / f"{part}.json").read_text())["status"] for part in ("check", "head")]
    assert ends == ["failed with code 1", "done"]


def test_without_a_gpu_no_result_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words in (["parts=head"], ["parts=head", "size=toy"], ["device=cpu"], ["part=head"], ["parts=heads"]):
        with pytest.raises(SystemExit):
            gpu.main([*words, f"out={tmp_path}/results"])
    assert not (tmp_path / "results").exists()


def test_an_arm_that_takes_too_long_is_killed_and_says_so(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"killed after 0\.1 s"):
        run("qwlit", tmp_path, most_seconds=0.1)


def test_figures_of_other_work_are_marked_and_meet_no_goal(tmp_path):
    case = Case("x", 300, 0.4)

    def measured(*losses: float, norm: float = 1.0) -> Measured:
        return Measured([], [], [], list(losses), [norm])

    ours = measured(1.0, 2.0)
    assert verdict(case, measured(1.0, 2.0), ours).startswith("agree")
    assert verdict(case, measured(1.0, 2.1), ours).startswith(INVALID)
    assert verdict(case, measured(1.0, float("nan")), ours).startswith(INVALID)
    assert verdict(case, measured(1.0, 2.0, norm=1.2), ours).startswith(INVALID)
    assert verdict(case, measured(1.0, 2.0, norm=float("nan")), ours).startswith(INVALID)
    assert agreement({"loss": float("nan")}, 1e-2).startswith(INVALID)
    runs = [Trained(losses=[1.0, 2.0]), Trained(losses=[1.0, 2.0000001])]
    assert compared(runs, [], must_be_equal=True).startswith(INVALID)
    assert not compared(runs, [], must_be_equal=False).startswith(INVALID)
    lost = [Trained(losses=[1.0, float("nan")])] * 2
    assert compared(lost, runs, must_be_equal=False).startswith(INVALID)
    rows = [
        {"table": "t", "trainer": "qwlit", "tokens/s": 130_000.0, COMPARED: "reference"},
        {"table": "t", "trainer": "trl_best", "qwlit is faster by": 1.5, "qwlit's share": 0.5, COMPARED: "agree"},
        {"table": "t", "trainer": "trl_flash", "qwlit is faster by": 0.5, "qwlit's share": 2.0, COMPARED: INVALID},
    ]
    facts = {"command": "c", "status": "done", "seconds": 1.0, "machine": {"gpu": "A100"}, "settings": {}, "rows": rows}
    (tmp_path / "full.json").write_text(json.dumps(facts | {"size": "full"}))
    page = render(tmp_path)
    assert "| goal, on one H100 | | measured, on A100 |" in page
    assert "| ≥ 120,000 | 130,000 |" in page and "1.50 × (trl_best)" in page
    (tmp_path / "full.json").write_text(json.dumps(facts | {"size": "toy"}))
    assert "| ≥ 120,000 | unmeasured |" in render(tmp_path)


def test_the_figures_of_gpus_in_the_documents_are_those_of_the_result_files():
    page = PAGE.read_text()
    assert with_section(page, render(RESULTS)) == page
