"""The comparison's page and its command: what they show, that the page needs nothing else, and that text stays text."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwlit.commands import report
from qwlit.commands.report import main
from qwlit.core.console import Screen
from qwlit.core.errors import ConfigError
from qwlit.core.files import locked
from qwlit.report.comparability import comparison_warnings
from qwlit.report.curves import MOST_POINTS, PANELS, _marks, draw_curves, thin
from qwlit.report.drawing import needs_log_axis
from qwlit.report.evaluated import question_of, scores
from qwlit.report.measured import against_plan, data_in_words, draw_lengths, lengths
from qwlit.report.table import columns
from qwlit.training.tracking.run_folder import RunFolder
from tests.reports import (
    Page,
    assert_self_contained,
    column,
    comparison_of,
    page_of,
    searched,
    write_run,
    write_sweep,
)


def command(*words):
    """Run the subcommand; return what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(list(words))
    return out.getvalue()


def test_text_of_users_is_text_in_the_page(tmp_path):
    evil = "<img src='x' onerror=alert(1)>"
    sample = {"prompt": evil, "answer": "二〇二四年", "expected": "&amp;", "exact": False}
    event = {"step": 1, "event": "finding", "time": 1.0, "message": evil}
    path = write_run(tmp_path / "<b>中文名", {"data.path": evil}, samples=[sample], events=[event])
    page = assert_self_contained(page_of(comparison_of(path)))
    assert "b" not in page.tags
    assert page.text.count(evil) == 3 and "&amp;" in page.text and "二〇二四年" in page.text
    other = write_run(tmp_path / "<style>", {"data.path": "x", "optim.<i>": 2}, 2.0)
    third = write_run(tmp_path / "c", {"data.path": "x", "optim.<i>": 3}, 3.0)
    several = assert_self_contained(page_of(comparison_of(path, other, third)))
    assert "optim.<i>" in several.text and "i" not in several.tags
    assert "<b>中文名" in several.text and "<style>" in several.text


def test_a_sweeps_page_has_curves_bars_and_slices_with_every_choice_as_text(tmp_path):
    text = page_of(comparison_of(searched(tmp_path)))
    page = assert_self_contained(text)
    assert {"svg", "table", "figure"} <= page.tags
    assert "Which settings mattered" in page.text and "val/loss against each setting" in page.text
    slices = Page(text[text.index("against each setting") : text.index(">Curves<")]).text
    assert "中文" in slices and "<i>" in slices and "constant" not in slices
    # Ticks of a log axis: those of the learning rate.
    assert "5e-5" in slices and "5e-4" in slices


def test_each_named_validation_set_has_curves_and_its_paths_are_files_names(tmp_path):
    rows = [{"step": step, "val/loss": 2.0, "val/chat/loss": 3.0 - step, "val/math/loss": 1.0} for step in (1, 2)]
    settings = {"data.val_path": {"chat": "/here/a.jsonl", "math": [{"path": "/here/b.jsonl", "weight": None}]}}
    comparison = comparison_of(write_run(tmp_path / "a", settings, rows=rows), write_run(tmp_path / "b"))
    titles = re.findall(r"Validation loss(?:, \w+)?", assert_self_contained(page_of(comparison)).text)
    assert titles == ["Validation loss", "Validation loss, chat", "Validation loss, math"]
    run = next(run for run in comparison.runs if run.name == "a")
    assert run.settings["data.val_path.chat"] == "a.jsonl"
    assert run.settings["data.val_path.math"] == [{"path": "b.jsonl", "weight": None}]


def test_forty_runs_get_seven_colours_and_the_rest_is_grey(tmp_path):
    for number in range(40):
        write_run(tmp_path / f"r{number:02d}", val=40.0 - number)
    page = Page(page_of(comparison_of(tmp_path / "r*")))
    legend = page.text[page.text.index("Curves") :]
    assert "33 more" in legend and all(f"r{number}" in legend for number in (39, 38, 37, 36, 35, 34))
    assert "r00" in legend and "r33" not in legend


def test_a_run_without_metrics_has_a_page(tmp_path):
    path = write_run(tmp_path / "a")
    (path / "metrics.jsonl").unlink()
    assert "Curves" not in page_of(comparison_of(path))


def test_a_long_curve_is_thinned_and_keeps_its_spikes():
    series = [(step, 1000.0 if step == 77_777 else 1.0) for step in range(1, 100_001)]
    spiked = thin(series, peaks=True)
    assert len(spiked) <= MOST_POINTS + 1 and max(value for _, value in spiked) == 1000
    assert spiked[-1][0] == 100_000
    smooth = thin(series)
    assert max(value for _, value in smooth) == pytest.approx(1 + 999 / (100_000 / MOST_POINTS), rel=0.02)
    assert thin(series[:MOST_POINTS]) == series[:MOST_POINTS]


def test_a_log_axis_is_for_values_far_apart_above_zero():
    assert (
        needs_log_axis([0.006, 6.5])
        and not needs_log_axis([1.2, 4.0])
        and not needs_log_axis([0.0, 100.0])
        and not needs_log_axis([])
    )
    assert not needs_log_axis([0.01, 1.0, 2.0], above=1.0) and needs_log_axis([0.01, 1.0, 50.0], above=1.0)


def test_the_page_goes_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/deep/b", {"optim.lr": 2})
    sweep = write_sweep(tmp_path / "s", [("done", 1.0, {"optim.lr": 1}, None)])
    for words, place in (
        (["runs=runs/a"], "runs/a/report.html"),
        (["runs=[runs/a,runs/deep/b]"], "runs/report.html"),
        ([f"runs={sweep}"], "s/report.html"),
        (["runs=runs/a", "page=mine.html"], "mine.html"),
    ):
        assert Path(place).name in command(*words)
        Path("earlier.html").hardlink_to(place)
        before = Path(place).read_text(encoding="utf-8")
        assert before.startswith("<!DOCTYPE html>")
        write_run(Path("runs/more"), val=7.0)
        command(*words, "baseline=runs/more", *([] if len(words) > 1 else [f"page={place}"]))
        # Another file in its place, so that a reader never meets half of one.
        assert Path("earlier.html").read_text(encoding="utf-8") == before != Path(place).read_text(encoding="utf-8")
        Path("earlier.html").unlink()
        shutil.rmtree("runs/more")
        Path(place).unlink()
    with pytest.raises(ConfigError, match=r"none/x\.html cannot be written: .*page=FILE"):
        main(["runs=runs/a", "page=none/x.html"])


def test_json_has_what_scripts_read(tmp_path):
    write_run(tmp_path / "a", {"optim.lr": 1e-4}, 2.0, events=[{"step": 1, "event": "skip"}])
    write_run(tmp_path / "b", {"optim.lr": 2e-4}, 1.5, summary={"exact_match": 0.5})
    said = json.loads(command(f"runs=[{tmp_path}/a,{tmp_path}/b]", "output=json"), parse_constant=pytest.fail)
    assert (said["best"], said["baseline"], said["differing"]) == ("b", "a", ["optim.lr"])
    assert said["metric"] == {"name": "val/loss", "goal": "minimize"}
    best, other = said["runs"]
    assert (best["value"], best["delta"], best["exact_match"], best["settings"]) == (1.5, -0.5, 0.5, {"optim.lr": 2e-4})
    assert (other["events"]["skip"], other["wall_seconds"], other["status"]) == (1, 61.2, "done")
    assert said["importance"] is None and said["page"] == f"{tmp_path}/report.html"


def test_a_narrow_screen_leaves_figures_out_and_says_so(tmp_path, monkeypatch):
    write_run(tmp_path / "a", events=[{"step": 1, "event": "skip"}])
    write_run(tmp_path / "b", {"optim.lr": 2}, 2.0)
    words, shown = f"runs=[{tmp_path}/a,{tmp_path}/b]", {}
    for width in (60, 200):
        file = io.StringIO()
        monkeypatch.setattr(report, "console", lambda file=file, width=width: Screen(file=file, width=width))
        command(words)
        shown[width] = file.getvalue()
    assert "too narrow for time, train/loss, steps:" in shown[60] and "too narrow" not in shown[200]
    for text in ("1.0000", "+1.0000", "1 skipped"):
        assert text in shown[60] and text in shown[200]
    assert "0:01:01" in shown[200] and "0:01:01" not in shown[60]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"runs is not set; name run folders"),
        (["runs=[]"], r"is empty; name run folders"),
        (["runs=a", "base=b"], r"base=b: there is no 'base' here\. Did you mean 'baseline'\?"),
        (["runs/a"], r"'runs/a' is not an option of report; .* runs=\[a,b\]"),
        (["runs=a", "output=jsn"], r"output=jsn: choose one of text, json"),
    ],
)
def test_wrong_options_are_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        main(words)


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'matplotlib', 'optuna', 'hydra'}"
    code = (
        "import sys; sys.argv = ['qwlit', 'report', '--help']; from qwlit.__main__ import main; main();"
        f"assert not {heavy} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "baseline" in done.stdout, done.stderr


def running(path, **how):
    """A run that trains: its summary says so, and its lock is held."""
    write_run(path, summary={"status": "running"}, **how)
    RunFolder(path).lock_file.parent.mkdir(exist_ok=True)
    return locked(RunFolder(path).lock_file)


def test_a_followed_page_loads_itself_again_until_the_run_ends(tmp_path, monkeypatch, capsys):
    path, pages = tmp_path / "run", []

    def sleep(seconds):
        pages.append((path / "report.html").read_text(encoding="utf-8"))
        if len(pages) == 2:
            RunFolder(path).write_summary(status="done")

    monkeypatch.setattr("time.sleep", sleep)
    with running(path):
        main([f"runs={path}", "follow=true"])
    last = (path / "report.html").read_text(encoding="utf-8")
    assert [page.count('<meta http-equiv="refresh" content="10">') for page in (*pages, last)] == [1, 1, 0]
    assert "1 run, running" in pages[0] and "1 run, done" in last and "1 run, done" in capsys.readouterr().out


def test_ctrl_c_ends_following_with_a_whole_page(tmp_path, monkeypatch):
    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    with running(tmp_path / "run"):
        main([f"runs={tmp_path / 'run'}", "follow=true"])
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "refresh" not in page and page.endswith("</html>\n") and "1 run, running" in page


def test_the_page_of_one_run_has_its_groups_its_guarantee_and_its_answers_by_prompt(tmp_path):
    rows = [{"step": n, "optim/lr": 1, "optim/grad_norm/decay": n, "optim/update_ratio/decay": 0.1} for n in (1, 2, 3)]
    asked = [{"step": n, "prompt": prompt, "answer": f"{prompt}{n}"} for n in (1, 2) for prompt in ("p", "q")]
    decision = {"from_step": 9, "to_step": 2, "reason": "the loss rose", "cause": "divergence", "skipped_steps": 0}
    back = {"step": 2, "event": "rollback", "reason": "the loss rose", "decision": decision, "before": [decision]}
    run = write_run(tmp_path / "run", rows=rows, samples=[*asked, {"prompt": "z", "answer": "end"}], events=[back])
    text = Page(page_of(comparison_of(run))).text
    assert "Gradient norm, decay" in text and "Change of the weights, decay" in text
    assert "fast: the same command may give other last digits; attention sdpa, 32-true, 1 x CPU." in text
    assert re.findall(r"end|[pq][12]", text[text.index("Samples") :]) == ["end", "p1", "p2", "q1", "q2"]
    assert "from_step: 9; to_step: 2; reason: the loss rose; cause: divergence" in text and "before" not in text


def cells(text, heading):
    """The cells of the first table below a heading, line by line."""
    table = text[text.index(f"<h2>{heading}<") :]
    lines = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line) for line in lines]


def test_the_page_shows_the_plan_beside_what_was_measured(tmp_path):
    plan = {"steps": 20, "tokens": 6000.0, "memory_gib": 4.0, "mfu": 0.4, "seconds": 60.0}
    measured = {"peak_memory_gib": 3.0, "tokens_per_second": 50.0, "wall_seconds": 150.0}
    rows = [{"step": 5, "throughput/mfu": 0.1}, {"step": 10, "throughput/mfu": 0.3}]
    run = write_run(tmp_path / "a", manifest={"plan": plan}, summary=measured, rows=rows)
    assert cells(page_of(comparison_of(run)), "Plan and reality")[1:] == [
        ["peak memory of a device, GiB", "4.00", "3.00", "0.75"],
        ["steps", "20", "10", "0.50"],
        ["time", "0:01:00", "0:02:30", "2.50"],
        ["tokens/s", "100", "50", "0.50"],
        ["MFU", "40.0%", "20.0%", "0.50"],
    ]
    on_cpu = write_run(tmp_path / "b", manifest={"plan": plan | {"seconds": None}}, summary=measured)
    text = page_of(comparison_of(on_cpu))
    assert cells(text, "Plan and reality")[3:] == [["time", "–", "0:02:30", "–"], ["tokens/s", "–", "50", "–"]]
    assert "no planned time: the peak of this device is not known" in text
    old = page_of(comparison_of(write_run(tmp_path / "c")))
    assert cells(old, "Plan and reality")[1] == ["steps", "–", "10", "–"] and "<h2>Data" not in old


def test_the_page_shows_lengths_and_what_became_of_the_rows(tmp_path):
    kinds = {"tokens": {"sum": 2000, "percentiles": [*range(21)]}}
    kinds["supervised_tokens"] = {"sum": 500, "percentiles": [1] * 21}
    counts = {"read": 12, "accepted": 10, "too_long": 0, "quarantined": 2, "truncated": 1}
    samples = {"number": 10, **kinds}
    run = write_run(tmp_path / "a", manifest={"samples": samples}, summary={"rows": counts})
    text = page_of(comparison_of(run))
    assert "10 training samples with 2,000 tokens, 25.0% of them supervised" in text
    assert "12 read, 10 accepted, 2 quarantined, 1 truncated (reasons in quarantine.jsonl)" in text
    assert cells(text, "Data") == [
        ["", "least", *(f"{percent}\u00a0%" for percent in (5, 25, 50, 75, 95)), "most"],
        ["tokens of a sample", "0", "1", "5", "10", "15", "19", "20"],
        ["supervised tokens of a sample", *["1"] * 7],
    ]
    assert "samples with at most so many" in text
    for broken in (7, {"tokens": 7}, samples | {"tokens": {"sum": "x", "percentiles": [None] * 21}}):
        other = write_run(tmp_path / str(len([*tmp_path.iterdir()])), manifest={"samples": broken, "plan": broken})
        (record,) = comparison_of(other).runs
        assert lengths(record) is draw_lengths(record) is None and not data_in_words(record)
        assert [line[1] for line in against_plan(record).lines] == ["–", "–"]


def test_alarms_cuts_and_what_was_undone_are_drawn(tmp_path):
    def decision(start, end, cause):
        return {"from_step": start, "to_step": end, "cause": cause, "reason": "", "skipped_steps": 0}

    first, last = decision(90, 60, "divergence"), decision(40, 20, "data")
    back = {"step": 20, "event": "rollback", "decision": last, "before": [first]}
    rows = [{"step": step, "train/loss": 2.0} for step in (10, 30, 100)]
    run = write_run(tmp_path / "a", rows=rows, events=[{"step": 5, "event": "rollback", "before": 7}, back])
    undone = [{"rollback": 0, "file": "metrics.jsonl", "step": step, "train/loss": 700.0} for step in (70, 80)]
    RunFolder(run).write_records("rolled_back.jsonl", [*undone, {"file": "events.jsonl", "step": 80}])
    (record,) = comparison_of(run).runs
    found = {mark: steps for mark, steps in _marks(record).items() if steps}
    assert found == {"alarm": [40, 90], "cut": [60], "rollback": [5, 20]}
    svg = draw_curves(next(panel for panel in PANELS if panel.key == "train/loss"), [record], {})
    assert "alarm of the guard" in svg and "at half the learning rate" in svg and ">100<" in svg


def evaluation(score, *, rows="aa", temperatures=(0.7,)):
    points = [{"temperature": t, "score": score + t / 10, "low": score, "high": score + 0.2} for t in temperatures]
    group = {"loss": 0.5 - score, "accuracy": score}
    quality = {"non_thinking": {"exact_match": points}, "thinking": {"exact_match": points[:1]}}
    return {"groups": {"all": {"all": group}}, "data": [rows], "prompts": 20, "quality": quality}


def test_what_evaluate_measured_stands_beside_loss_and_time(tmp_path):
    for name, measured in {"a": evaluation(0.25), "b": evaluation(0.5), "c": None}.items():
        path = write_run(tmp_path / name)
        if measured:
            RunFolder(path).write_json("evaluation.json", measured)
    together = comparison_of(tmp_path / "*")
    titles = [each.title for each in columns(together)]
    expected = ["evaluated loss", "evaluated accuracy", "evaluated exact_match", "evaluated exact_match, thinking"]
    assert titles[:9] == ["run", "status", "val/loss", "Δ", *expected, "time"]
    shown = [each.cells for each in columns(together)][4:7]
    assert shown == [["0.2500", "0.0000", "–"], ["25.00%", "50.00%", "–"], [*EXACT, "–"]]
    assert not any("evaluated" in text for text in comparison_warnings(together))
    RunFolder(tmp_path / "b").write_json("evaluation.json", evaluation(0.5, rows="bb", temperatures=(0.0, 0.9)))
    apart = comparison_of(tmp_path / "*")
    assert any("evaluated on other rows" in text for text in comparison_warnings(apart))
    assert column(apart, expected[2])[1] == "0.590 (0.500–0.700) at 0.9"
    said = json.loads(command(f"runs={tmp_path / 'b'}", "output=json"))["runs"][0]["evaluation"]
    assert said[expected[0]]["value"] == 0 and said[expected[2]]["temperature"] == 0.9


def test_an_evaluation_from_before_the_run_was_trained_on_is_named(tmp_path):
    run = write_run(tmp_path / "a")
    for step in (100, 200):
        (run / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:06}" / "MANIFEST.json").write_text("{}")
    for pointer in ("best", "last"):
        (run / "checkpoints" / pointer).symlink_to("step-000200")
    for checkpoint, expected in (("step-000200", []), ("step-000100", ["a (step-000100)"])):
        RunFolder(run).write_json("evaluation.json", {"checkpoint": checkpoint, **evaluation(0.5)})
        warnings = comparison_warnings(comparison_of(run))
        assert [text.rpartition(": ")[2] for text in warnings if "`evaluate`" in text] == expected


EXACT = ["0.320 (0.250–0.450)", "0.570 (0.500–0.700)"]


@pytest.mark.parametrize(
    "broken",
    [
        "[]",
        '{"groups": {"all": 7}, "quality": {"thinking": []}}',
        '{"groups": 7, "quality": {"thinking": {"<b>": [{"score": "x"}, 7]}}}',
        '{"quality": 7}',
    ],
)
def test_a_broken_evaluation_is_none(broken, tmp_path):
    (write_run(tmp_path / "a") / "evaluation.json").write_text(broken)
    (run,) = comparison_of(tmp_path / "a").runs
    assert not scores(run.evaluation)
    question_of(run.evaluation)
