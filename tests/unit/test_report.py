"""The comparison: which runs are meant, what they differ in, what may be compared, which settings mattered."""

import math
import random
import re

import pytest
import yaml

from qwlit.core.errors import ConfigError
from qwlit.core.files import locked, read_json_lines
from qwlit.core.lists import read_list
from qwlit.report.comparability import comparison_warnings
from qwlit.report.find import find_runs
from qwlit.report.importance import importance
from qwlit.report.repeats import find_repeats
from qwlit.report.table import columns
from qwlit.training.tracking.run_folder import RunFolder
from tests.reports import column, comparison_of, names, page_of, searched, write_run, write_sweep


def test_a_list_is_split_at_commas_outside_quotes():
    assert read_list("[runs/a, 'runs/b,c' ,\"d]\",中文]") == ["runs/a", "runs/b,c", "d]", "中文"]
    assert read_list("runs/a,b=1") == ["runs/a,b=1"]
    assert read_list("[]") == []


def test_globs_take_runs_and_sweeps_and_leave_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "runs/中文")
    write_run(tmp_path / "runs/.a.deleted-7")
    write_sweep(tmp_path / "runs/s", [("done", 1.0, {"optim.lr": 1}, None), ("failed", None, {"optim.lr": 2}, "x")])
    (tmp_path / "runs/.store").mkdir()
    (tmp_path / "runs/notes").mkdir()
    (tmp_path / "runs/report.html").write_text("")
    monkeypatch.chdir(tmp_path)
    found = find_runs(["~/runs/*", "runs/中文", "runs/../runs/s"])
    assert [run.path.name for run in found] == ["trial-0000", "trial-0001", "中文"]
    assert [run.exists for run in found] == [True, False, True]


def test_a_name_with_glob_characters_is_a_name(tmp_path):
    write_run(tmp_path / "a[1]")
    write_run(tmp_path / "a1")
    assert [run.path.name for run in find_runs([str(tmp_path / "a[1]")])] == ["a[1]"]


def test_a_name_in_runs_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "lora-1")
    (tmp_path / "lora-1").mkdir()  # something else
    for word in ("lora-1", "lora-*"):
        assert [run.path.resolve() for run in find_runs([word])] == [tmp_path / "runs/lora-1"]
    with pytest.raises(ConfigError, match=r"Did you mean 'lora-1'"):
        find_runs(["lora-7"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lroa", r"lroa: there is no such folder\. Did you mean 'lora'\?"),
        ("lroa-*", r"lroa-\* matches no run\. Did you mean 'lora'\?"),
        ("nowhere/at/all", r"there is no such folder\.$"),
        ("lora,lora", r"runs=\[a,b\]"),
        ("empty", r"empty is not a run: it has no config\.yaml"),
        (".", r"is not a run: it contains runs: name them with .*/\*"),
        ("file", r"is a file; name the run's folder"),
        ("broken", r"sweep\.json is not a readable sweep\.json"),
        ("bare", r"the sweep has no trials yet"),
    ],
)
def test_what_is_no_run_is_said_in_one_line(word, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "lora")
    for folder in ("empty", "broken", "bare"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken/sweep.json").write_text('{"metric": {"name": "val/loss"}, "trials": [3]}')
    (tmp_path / "bare/sweep.json").write_text('{"metric": {"name": "val/loss"}, "trials": []}')
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=said):
        find_runs([word])


def test_only_settings_that_differ_are_shown_without_the_runs_own_and_paths_by_their_last_part(tmp_path):
    a = {"optim.lr": 1e-4, "train.max_epochs": 1, "data.path": "/here/chat.jsonl", "model.path": "/x/base"}
    b = {"optim.lr": 3e-4, "train.max_epochs": 1.0, "data.path": "/there/chat.jsonl", "model.path": "/x/other"}
    comparison = comparison_of(write_run(tmp_path / "a", a), write_run(tmp_path / "b", b | {"newer.setting": 7}))
    assert set(comparison.differing) == {"model.path", "optim.lr"}
    assert column(comparison, "optim.lr") == ["1e-4", "3e-4"]
    assert column(comparison, "model.path") == ["base", "other"]


def test_many_differences_become_a_list_of_what_is_other_than_in_the_baseline(tmp_path):
    keys = [f"optim.k{number}" for number in range(12)]
    write_run(tmp_path / "a", dict.fromkeys(keys, 1))
    write_run(tmp_path / "b", dict.fromkeys(keys, 1) | {"optim.k3": 2})
    write_run(tmp_path / "c", dict.fromkeys(keys, 3))
    comparison = comparison_of(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert column(comparison, "other than the baseline") == ["", "optim.k3=2", " ".join(f"{key}=3" for key in keys)]
    assert columns(comparison, most_listed=2)[-1].cells[1:] == ["optim.k3=2", "optim.k0=3 optim.k1=3 and 10 more"]


def test_runs_are_ordered_by_validation_loss_and_measured_against_the_first_named(tmp_path):
    paths = [write_run(tmp_path / name, val=val) for name, val in (("a", 1.5), ("b", 1.25), ("c", None), ("d", 2.0))]
    comparison = comparison_of(*paths)
    assert names(comparison) == ["b", "a", "d", "c"]
    assert (comparison.best.name, comparison.baseline.name) == ("b", "a")
    assert column(comparison, "Δ") == ["-0.2500", "baseline", "+0.5000", "–"]
    assert column(comparison, "run") == ["b\u00a0★", "a", "d", "c"]


def test_the_baseline_is_named_or_a_folder_that_joins_the_list(tmp_path):
    for name, val in (("a", 1.0), ("b", 2.0), ("other", 3.0)):
        write_run(tmp_path / name, val=val)
    assert comparison_of(tmp_path / "a", tmp_path / "b", baseline="b").baseline.name == "b"
    comparison = comparison_of(tmp_path / "a", tmp_path / "b", baseline=str(tmp_path / "other"))
    assert (comparison.baseline.name, names(comparison)) == ("other", ["a", "b", "other"])
    assert len(comparison_of(tmp_path / "a", tmp_path / "b", baseline=str(tmp_path / "a")).runs) == 2
    with pytest.raises(ConfigError, match=r"baseline=oter: no listed run has this name\. Listed are a, b\."):
        comparison_of(tmp_path / "a", tmp_path / "b", baseline="oter")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    comparison = comparison_of(write_run(tmp_path / "x/s/r", val=1.0), write_run(tmp_path / "y/s/r", val=2.0))
    assert names(comparison) == ["x/s/r", "y/s/r"]


def test_small_losses_keep_four_digits(tmp_path):
    comparison = comparison_of(write_run(tmp_path / "a", val=0.006651539), write_run(tmp_path / "b", val=0.016650624))
    assert column(comparison, "val/loss") == ["0.006652", "0.016651"]


def test_a_run_without_a_summary_is_read_from_its_metrics(tmp_path):
    rows = [{"step": 3, "train/loss": 3.0, "memory/peak_gib": 2.0}, {"step": 6, "val/loss": 1.5}]
    path = write_run(tmp_path / "a", rows=[*rows, {"step": 9, "train/loss": 2.5, "val/loss": 1.75}])
    (path / "summary.json").write_text('{"status": "do')
    (path / "manifest.json").unlink()
    (run,) = comparison_of(path).runs
    results = run.results
    assert (run.status, results.val_loss, results.train_loss, results.steps) == ("unknown", 1.5, 2.5, 9)
    assert (results.peak_memory_gib, results.wall_seconds) == (2.0, None)


def test_a_half_written_last_line_and_what_is_no_number_are_left_out(tmp_path):
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": math.nan, "val/loss": 1.5}]
    path = write_run(tmp_path / "a", rows=rows, summary={"val_loss_best": math.nan, "train_loss_last": "?"})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": NaN}\n{"step": "x", "val/loss": 0.1}\n{"step": 3, "val/los')
    (run,) = comparison_of(path).runs
    assert run.series["train/loss"] == [(1, 2.0)]
    assert (run.results.val_loss, run.results.train_loss) == (1.5, 2.0)
    assert "NaN" not in page_of(comparison_of(path))


@pytest.mark.parametrize("missing", ["config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "summary.json"])
def test_any_file_may_be_missing_or_broken(missing, tmp_path):
    a, b = write_run(tmp_path / "a", {"optim.lr": 1}), write_run(tmp_path / "b", {"optim.lr": 2}, 2.0)
    (b / missing).unlink()
    assert set(names(comparison_of(a, b))) == {"a", "b"} and page_of(comparison_of(a, b))
    (b / missing).write_bytes(b"{\xff[\n{")
    assert set(names(comparison_of(a, b))) == {"a", "b"} and page_of(comparison_of(a, b))


def test_a_run_that_says_it_is_running_and_holds_no_lock_was_killed(tmp_path):
    path = write_run(tmp_path / "a", summary={"status": "running"})
    assert comparison_of(path).runs[0].status == "killed"
    with locked(RunFolder(path).lock_file):
        assert comparison_of(path).runs[0].status == "running"
    assert comparison_of(path).runs[0].status == "killed"


def test_what_an_earlier_attempt_summed_up_is_not_taken_for_a_running_run(tmp_path):
    path = write_run(tmp_path / "a", val=0.5, summary={"status": "running", "val_loss_best": 0.75, "steps": 4})
    results = comparison_of(path).runs[0].results
    assert (results.val_loss, results.steps, results.wall_seconds) == (0.5, 10, None)


def test_what_happened_to_a_run_is_counted(tmp_path):
    events = [{"step": 3, "event": "skip"}, {"step": 4, "event": "skip"}, {"step": 2, "event": "damaged"}]
    events += [{"step": 2, "event": kind} for kind in ("resumed", "resumed", "preempted", "checkpoint")]
    write_run(tmp_path / "a", events=events, summary={"status": "stopped"})
    write_run(tmp_path / "b", val=2.0, summary={"skipped_steps": 3})
    told = column(comparison_of(tmp_path / "a", tmp_path / "b"), "stability")
    assert told == [
        "2 skipped, 1 damaged checkpoint, preempted 1x, resumed 2x, stopped by the guard at step 4",
        "3 skipped",
    ]


def test_that_a_sweep_ended_a_trial_is_no_preemption(tmp_path):
    sweep = write_sweep(tmp_path / "s", [("pruned", 1.0, {"optim.lr": 1}, "not among the best")])
    folder = RunFolder(sweep / "trial-0000")
    folder.append_event(5, "preempted")
    assert column(comparison_of(sweep), "stability") == ["not among the best"]
    folder.append_event(6, "preempted")
    assert column(comparison_of(sweep), "stability") == ["preempted 1x, not among the best"]


def test_a_text_with_other_line_ends_is_one_line_of_json(tmp_path):
    sample = {"prompt": "one\u2028two\x85three", "answer": "x", "expected": "y", "exact": False}
    path = write_run(tmp_path / "a", samples=[sample])
    assert len(read_json_lines(path / "samples.jsonl")) == 1
    assert "one\u2028two\\x85three" in page_of(comparison_of(path))


def test_alike_runs_get_no_remark(tmp_path):
    assert (
        comparison_warnings(comparison_of(write_run(tmp_path / "a"), write_run(tmp_path / "b", {"optim.lr": 2}))) == []
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data": "aa11+cc33"}, "validation sets differ"),
        ({"data": "cc33+bb22"}, "trained on different data"),
        ({"data": "aa11+bb22*3"}, "trained on different data"),
        ({"device": "NVIDIA H100"}, r"different devices.*1 x CPU: a \| 1 x NVIDIA H100: b"),
        ({"devices": 2}, r"1 x CPU: a \| 2 x CPU: b"),
        ({"precision": "bf16-mixed"}, "Precision differs"),
        ({"attention": "eager"}, "Attention differs"),
        ({"determinism": "strict"}, "Determinism differs"),
        ({"git": {"commit": "1234567890", "dirty": True}}, r"0\.1\.0 at 73bf86c: a \| 0\.1\.0 at 1234567 with changes"),
        ({"qwlit": "0.2.0", "git": None}, "different versions of qwlit"),
    ],
)
def test_what_stands_in_the_way_of_a_comparison_is_said_and_nothing_else(other, said, tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", {"optim.lr": 2}, manifest=other)
    (remark,) = comparison_warnings(comparison_of(a, b))
    assert re.search(said, remark), remark


def test_a_held_out_share_is_part_of_what_is_validated_on(tmp_path):
    held_out = {"data": "aa11/0.1"}
    a, b = write_run(tmp_path / "a", manifest=held_out), write_run(tmp_path / "b", manifest={"data": "aa11/0.2"})
    assert any("validation sets differ" in remark for remark in comparison_warnings(comparison_of(a, b)))
    c = write_run(tmp_path / "c", {"optim.lr": 2}, manifest=held_out)
    assert comparison_warnings(comparison_of(a, c)) == []


def test_losses_of_other_validation_data_are_no_measure_of_noise(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", val=1.5, manifest={"data": "aa11+cc33"})
    (remark,) = comparison_warnings(comparison_of(a, b))
    assert "validation sets differ" in remark


def test_noise_is_of_runs_that_finished_and_said_once(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", val=1.5)
    killed = write_run(tmp_path / "c", val=9.0, summary={"status": "running"})
    (remark,) = comparison_warnings(comparison_of(a, b, killed))
    assert "same settings and seed, a, b differ by 0.5 in val/loss" in remark


def test_where_there_is_no_manifest_nothing_is_claimed(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", {"optim.lr": 2})
    (b / "manifest.json").unlink()
    (remark,) = comparison_warnings(comparison_of(a, b))
    assert "have no manifest.json" in remark and remark.endswith(": b")


def test_repeats_say_how_far_noise_goes(tmp_path):
    for name, seed, val in (("a", 0, 1.0), ("b", 0, 1.03), ("c", 1, 1.2)):
        write_run(tmp_path / name, {"seed": seed}, val)
    write_run(tmp_path / "d", {"seed": 2, "optim.lr": 3}, 9.0)
    write_run(tmp_path / "e", {"seed": 3, "optim.lr": 1}, 8.0)
    for name in "abc":
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config | {"optim": {"lr": 2}}))
    comparison = comparison_of(*(tmp_path / name for name in "abcde"))
    (same,) = comparison_warnings(comparison)
    assert "same settings and seed, a, b differ by 0.03" in same
    # The same seed again says nothing about other seeds.
    (group,) = find_repeats(comparison)
    assert [run.name for run in group.runs] == ["a", "c"] and group.estimates["val/loss"].mean == pytest.approx(1.1)


def test_a_sweep_stands_for_its_trials_the_finished_ones_first(tmp_path):
    lr = [{"optim.lr": value} for value in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4)]
    sweep = write_sweep(
        tmp_path / "lora",
        [
            ("done", 1.5, lr[0], None),
            ("pruned", 1.0, lr[1], None),
            ("done", 1.25, lr[2], None),
            ("failed", None, lr[3], "out of memory"),
            ("diverged", None, lr[4], "not finite"),
        ],
    )
    comparison = comparison_of(sweep)
    assert [(run.name[-1], run.status) for run in comparison.runs] == [
        *[("2", "done"), ("0", "done"), ("1", "pruned"), ("4", "diverged"), ("3", "failed")]
    ]
    assert (comparison.baseline.name, comparison.home) == ("trial-0002", sweep)
    assert column(comparison, "stability")[-2:] == ["not finite", "out of memory"]
    assert column(comparison, "optim.lr") == ["3e-4", "1e-4", "2e-4", "5e-4", "4e-4"]
    assert column(comparison, "Δ")[:3] == ["baseline", "+0.2500", "-0.2500"]


def test_a_sweeps_own_metric_and_goal_order_it(tmp_path):
    trials = [("done", value, {"optim.lr": value}, None) for value in (0.2, 0.9, 0.5)]
    comparison = comparison_of(write_sweep(tmp_path / "s", trials, metric="val/accuracy", goal="maximize"))
    assert [comparison.value(run) for run in comparison.runs] == [0.9, 0.5, 0.2]
    assert [column.title for column in columns(comparison)][2:6] == ["val/accuracy", "Δ", "optim.lr", "val/loss"]
    beside = comparison_of(tmp_path / "s", write_run(tmp_path / "plain", val=0.3))
    assert beside.metric.name == "val/loss" and names(beside)[:2] == ["trial-0000", "plain"]


def test_the_setting_that_decides_the_metric_comes_first_and_constants_are_left_out(tmp_path):
    judged = importance(comparison_of(searched(tmp_path)))
    assert next(iter(judged.shares)) == "optim.lr" and judged.shares["optim.lr"] > 0.6
    assert set(judged.shares) == {"optim.lr", "optim.weight_decay", "experiment"}
    assert sum(judged.shares.values()) == pytest.approx(1)
    assert not any("hint" in text for text in judged.caveats)


def test_pruned_trials_count_as_not_among_the_best(tmp_path):
    """Among finished runs alone, the learning rate hardly matters: runs with a bad one were pruned."""
    comparison = comparison_of(searched(tmp_path, early=lambda lr: lr < 3e-4))
    judged = importance(comparison)
    assert (judged.num_runs, judged.num_ended_early) == (30, sum(run.status == "pruned" for run in comparison.runs))
    assert judged.num_ended_early > 15 and judged.shares["optim.lr"] > 0.6


def test_pruned_trials_are_never_taken_for_the_best(tmp_path):
    """If they were, weight decay would matter: only they have a high one."""
    draw = random.Random(2)
    trials = []
    for number in range(40):
        params = {"optim.lr": draw.random(), "optim.weight_decay": draw.random()}
        if number % 8 == 0:
            trials.append(("pruned", 9.0, params | {"optim.weight_decay": 0.95 + 0.05 * draw.random()}, None))
        else:
            trials.append(("done", params["optim.lr"], params, None))
    for goal, sign in (("minimize", 1), ("maximize", -1)):
        signed = [(state, sign * value, params, reason) for state, value, params, reason in trials]
        judged = importance(comparison_of(write_sweep(tmp_path / goal, signed, metric="m", goal=goal)))
        assert next(iter(judged.shares)) == "optim.lr"


def test_a_metric_to_maximize_is_judged_from_its_other_end(tmp_path):
    """Only the best end says which setting it takes to get there: below 0.5 only weight decay changes the metric."""
    draw = random.Random(1)
    trials = []
    for number in range(40):
        params = {"optim.lr": draw.random(), "optim.weight_decay": draw.random()}
        value = 1 + params["optim.lr"] if params["optim.lr"] > 0.75 else params["optim.weight_decay"] ** 4
        trials.append(("done", value, params | {"n": number % 2}, None))
    up = importance(comparison_of(write_sweep(tmp_path / "up", trials, metric="m", goal="maximize")))
    down = importance(comparison_of(write_sweep(tmp_path / "down", trials, metric="m", goal="minimize")))
    assert (next(iter(up.shares)), next(iter(down.shares))) == ("optim.lr", "optim.weight_decay")


def test_few_runs_give_a_hint_and_fewer_nothing(tmp_path):
    assert any("hint" in text for text in importance(comparison_of(searched(tmp_path, 6))).caveats)
    assert importance(comparison_of(searched(tmp_path, 3))) is None


def test_of_plain_runs_only_what_shapes_the_mathematics_is_judged(tmp_path):
    for number in range(6):
        settings = {"seed": number, "optim.lr": [1, 2][number % 2], "optim.eps": [3, 4][number % 2]}
        write_run(tmp_path / f"r{number}", settings | {"hardware.devices": number}, 1.0 + number % 2)
    judged = importance(comparison_of(tmp_path / "r*"))
    assert set(judged.shares) == {"optim.lr"} and judged.together == (("optim.lr", "optim.eps"),)
    assert any("optim.lr, optim.eps always changed together" in text for text in judged.caveats)


def test_runs_with_other_validation_data_are_not_judged_together(tmp_path):
    for number in range(6):
        other = {"data": f"aa11+{number // 5}"}
        write_run(tmp_path / f"r{number}", {"optim.lr": number}, 1.0 + number, manifest=other)
    assert importance(comparison_of(tmp_path / "r*")) is None
    assert "against each setting" not in page_of(comparison_of(tmp_path / "r*"))
    assert importance(comparison_of(tmp_path / "r[0-4]")) is not None


def test_settings_that_shape_the_mathematics_come_before_those_that_do_not(tmp_path):
    a = {"hardware.devices": 1, "data.exact_match": 1, "optim.lr": 1, "train.max_steps": 1}
    comparison = comparison_of(write_run(tmp_path / "a", a), write_run(tmp_path / "b", dict.fromkeys(a, 2)))
    assert comparison.differing == ("optim.lr", "train.max_steps", "data.exact_match", "hardware.devices")
    assert comparison.searched == ("optim.lr", "train.max_steps")


def test_runs_that_did_not_finish_are_left_out(tmp_path):
    for number in range(6):
        settings, failed = {"optim.lr": number, "optim.eps": number // 5}, number == 5
        write_run(tmp_path / f"r{number}", settings, summary={"status": "failed" if failed else "done"})
    judged = importance(comparison_of(tmp_path / "r*"))
    assert (judged.num_runs, judged.num_left_out, set(judged.shares)) == (5, 1, {"optim.lr"})
