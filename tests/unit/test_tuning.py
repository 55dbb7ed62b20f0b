"""Sweep files, what they may try, the study's journal, the best trial's file, the range test's suggestion."""

import json
import math
import multiprocessing
import os
import random
import signal
import time

import optuna
import pytest
import yaml

from qwlit.config.compose import compose, dump
from qwlit.config.groups import conf_dir
from qwlit.config.run import recipe_settings
from qwlit.core.errors import ConfigError
from qwlit.tuning.best import as_experiment, fewest_overrides, write_best
from qwlit.tuning.lr_range import evaluate
from qwlit.tuning.optuna_search import check_metric
from qwlit.tuning.slots import allocate_slots
from qwlit.tuning.space import build_space, check_space, format_overrides, grid_points, with_distributions
from qwlit.tuning.study import Study
from qwlit.tuning.sweep_file import read_sweep, sweep_names
from qwlit.tuning.trial import JsonlTail

COMMAND = ["${env}", "${interpreter}", "-m", "qwlit", "train", "recipe=lora", "${args_no_hyphens}"]


def sweep_of(folder, name="search", **entries):
    document = {
        "method": "bayes",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1}},
        "command": COMMAND,
    } | entries
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    return read_sweep(str(file))


def study_of(folder, sweep, *, trials=20, seed=0):
    folder.mkdir(exist_ok=True)
    return Study(folder, sweep, build_space(sweep), trials=trials, seed=seed)


@pytest.mark.parametrize("name", sweep_names())
def test_every_parameter_of_every_sweep_names_a_setting_that_exists(name):
    sweep = read_sweep(name)
    check_space(sweep, [*sweep.overrides, "data.path=x.jsonl", "data.val_fraction=0.1"])
    build_space(sweep)


def test_the_guides_ranges_and_full_fine_tunings_own_are_searched():
    def ranges(name):
        return {key: (p.min, p.max, p.distribution) for key, p in read_sweep(name).document.parameters.items()}

    guide = {"optim.weight_decay": (0.01, 0.1, "uniform"), "scheduler.warmup_ratio": (0.05, 0.2, "uniform")}
    assert ranges("lora") == guide | {"optim.lr": (1e-5, 5e-4, "log_uniform_values")}
    assert ranges("full_sft") == guide | {"optim.lr": (1e-6, 1e-4, "log_uniform_values")}
    assert "train.max_epochs=3" in read_sweep("lora").overrides
    assert read_sweep("presets").document.parameters["experiment"].values == [
        "conservative",
        "balanced",
        "aggressive",
        "recommended",
    ]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"parameters": {"optim.lrr": {"values": [1]}}}, "optim.lrr: no such setting. Did you mean 'optim.lr'"),
        ({"parameters": {"optim.lr": {"values": [1e-4, -1.0]}}}, "optim.lr=-1.0"),
        ({"parameters": {"optim.lr": {"min": 1, "max": 0.1}}}, "min 1 is above max 0.1"),
        ({"parameters": {"optim.lr": {"max": 3}}}, "a range needs both min and max"),
        ({"parameters": {"optim.lr": {}}}, "give one of value, values, or min and max"),
        ({"parameters": {"optim.lr": {"value": 1, "min": 1, "max": 2}}}, "give one of value"),
        ({"parameters": {"optim.lr": {"values": [1e-4], "probabilities": [1.0]}}}, "only W&B supports them"),
        ({"parameters": {"optim.lr": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}}}, "above 0"),
        ({"parameters": {"run.name": {"values": ["a", "b"]}}}, "the sweep itself sets where a trial runs"),
        ({"parameters": {"optim.lr": {"minn": 1}}}, "no such entry. Did you mean 'min'"),
        ({"parameters": {"optim.lr": {"distribution": "beta"}}}, "only W&B supports it"),
        ({"parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "above 0"),
        ({"parameters": {"optim.lr": {"distribution": "uniform", "min": 0.1, "max": 1.0, "q": 0.1}}}, "has no step"),
        ({"parameters": {"optim": {"parameters": {"lr": {"value": 1}}}}}, "full name, parameters.optim.lr"),
        ({"parameters": {"optim.groups": {"values": [[{"match": "norm", "lr": 1e-5}]]}}}, "not rules with keys"),
        ({"parameters": {"optim.groups": {"value": {"match": "norm"}}}}, "not rules with keys"),
        ({"parameters": {"optim.lr": [1e-5, 1e-4]}}, "give value, values, or min and max"),
        ({"parameters": {}}, "parameters is empty"),
        ({"method": "grid"}, "a grid needs values"),
        ({"method": "tpe"}, "method"),
        ({"metrics": {}}, "no such entry. Did you mean 'metric'"),
        ({"command": ["python", "train.py"]}, "runs no `qwlit train`"),
        ({"command": [*COMMAND[:-1], "${args}"]}, "ends in ${args}"),
        ({"early_terminate": {"type": "hyperband"}}, "give min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_in_one_line(tmp_path, entries, said):
    with pytest.raises(ConfigError) as caught:
        sweep = sweep_of(tmp_path, **entries)
        build_space(sweep)
        check_space(sweep, [*sweep.overrides, "data.path=x.jsonl"])
        study_of(tmp_path / "s", sweep)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_multiples_of_q_are_w_and_bs_and_whole_where_q_is(tmp_path):
    parameters = {
        "train.global_batch_size": {"distribution": "q_uniform", "min": 7, "max": 33, "q": 8},
        "optim.weight_decay": {"distribution": "q_uniform", "min": 0.0, "max": 0.3, "q": 0.1},
    }
    sweep = sweep_of(tmp_path, method="grid", parameters=parameters)
    points = grid_points(build_space(sweep))
    assert points == {"optim.weight_decay": [0.0, 0.1, 0.2, 0.3], "train.global_batch_size": [8, 16, 24, 32]}
    check_space(sweep, [*sweep.overrides, "data.path=x.jsonl"])
    study = study_of(tmp_path / "s", sweep, trials=16)
    drawn = [study.next().parameters for _ in range(16)]
    assert {p["optim.weight_decay"] for p in drawn} == {0.0, 0.1, 0.2, 0.3}
    assert all(isinstance(p["train.global_batch_size"], int) for p in drawn)
    study = study_of(tmp_path / "r", sweep_of(tmp_path, method="random", parameters=parameters))
    drawn = [study.next().parameters for _ in range(20)]
    assert {p["train.global_batch_size"] for p in drawn} == {8, 16, 24, 32}


@pytest.mark.parametrize("entries", [{"q": 8}, {"q": 8.0}, {"q": 8, "distribution": "q_uniform"}])
def test_a_whole_step_is_kept_also_where_no_distribution_is_named(entries, tmp_path):
    parameters = {"train.global_batch_size": {"min": 8, "max": 64, **entries}}
    sweep = sweep_of(tmp_path, method="random", parameters=parameters)
    check_space(sweep, [*sweep.overrides, "data.path=x.jsonl"])
    study = study_of(tmp_path / "s", sweep)
    values = [study.next().parameters["train.global_batch_size"] for _ in range(12)]
    assert all(isinstance(value, int) and value % 8 == 0 for value in values) and len(set(values)) > 3
    # W&B would ignore q without its distribution.
    assert with_distributions(sweep)["train.global_batch_size"]["distribution"] == "q_uniform"


def test_an_unknown_sweep_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        read_sweep("lorra")


def test_values_are_written_as_train_reads_them():
    words = format_overrides(
        {"optim.amsgrad": True, "train.max_grad_norm": None, "optim.betas": [0.9, 0.95], "optim.lr": 3e-5}
    )
    assert words == ["optim.amsgrad=true", "train.max_grad_norm=null", "optim.betas=[0.9,0.95]", "optim.lr=3e-05"]
    config = compose(["recipe=full_sft", *words]).config
    assert (config.optim.amsgrad, config.train.max_grad_norm, config.optim.betas) == (True, None, (0.9, 0.95))


def test_a_grid_visits_every_point_once_whatever_dies_in_between(tmp_path):
    parameters = {"optim.lr": {"values": [1e-4, 1e-3]}, "train.global_batch_size": {"min": 1, "max": 3}}
    sweep = sweep_of(tmp_path, method="grid", parameters=parameters)
    assert math.prod(len(values) for values in grid_points(build_space(sweep)).values()) == 6
    seen = []
    for _ in range(3):  # each time the parent dies, with one trial under way that the next one adopts
        study = study_of(tmp_path / "s", sweep, trials=6)
        adopted = [study.next() for _ in range(2 if not seen else 3)]
        for assigned in adopted[:-1]:
            seen.append(tuple(assigned.parameters.values()))
            study.finish(assigned.number, "done", 1.0, None)
        study.close()
    study = study_of(tmp_path / "s", sweep, trials=6)
    while (assigned := study.next()) is not None:
        seen.append(tuple(assigned.parameters.values()))
        study.finish(assigned.number, "done", 1.0, None)
    assert len(seen) == 6 == len(set(seen))
    assert len(study.trials) == 6


@pytest.mark.parametrize("method", ["bayes", "random"])
def test_the_same_seed_draws_the_same_trials_also_when_the_parent_dies_on_the_way(tmp_path, method):
    sweep = sweep_of(tmp_path, method=method, parameters={"optim.lr": {"min": 0.0, "max": 1.0}})

    def draw(name, *, seed, dying_at):
        drawn = []
        study = study_of(tmp_path / name, sweep, seed=seed)
        while (assigned := study.next()) is not None:
            if assigned.number in dying_at and len(drawn) == assigned.number:
                dying_at = dying_at - {assigned.number}
                study.close()
                study = study_of(tmp_path / name, sweep, seed=seed)
                assigned = study.next()
            drawn.append(assigned.parameters["optim.lr"])
            study.finish(assigned.number, "done", (drawn[-1] - 0.3) ** 2, None)
        return drawn

    one = draw("a", seed=1, dying_at=set())
    assert one == draw("b", seed=1, dying_at={3, 12, 17})
    assert one != draw("c", seed=2, dying_at=set())
    assert len(set(one)) == 20
    if method == "bayes":
        assert sum(abs(lr - 0.3) for lr in one[10:]) < sum(abs(lr - 0.3) for lr in one[:10])


def test_diverged_trials_keep_the_search_away_and_failed_ones_say_nothing(tmp_path):
    sweep = sweep_of(tmp_path, parameters={"optim.lr": {"min": 0.0, "max": 1.0}})
    study = study_of(tmp_path / "s", sweep, trials=40)
    drawn = []
    while (assigned := study.next()) is not None:
        lr = assigned.parameters["optim.lr"]
        drawn.append(lr)
        study.finish(assigned.number, *(("diverged", None, "nan") if lr > 0.5 else ("done", 1 - lr, None)))
    # The finished ones draw it towards 0.5, the diverged ones away from beyond.
    assert sum(lr > 0.5 for lr in drawn[20:]) < 10
    states = {trial.user_attrs["outcome"]: trial.state for trial in study.trials}
    assert states["diverged"] == optuna.trial.TrialState.PRUNED


def test_a_trial_is_pruned_by_the_rule_of_the_file_and_this_outlives_the_parent(tmp_path):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    sweep = sweep_of(tmp_path, method="random", early_terminate=rule)
    study = study_of(tmp_path / "s", sweep)
    for value in (1.0, 0.9, 0.8, 2.0):
        assigned = study.next()
        assert not study.report(assigned.number, 1, value), "no trial is pruned before min_iter"
        pruned = study.report(assigned.number, 2, value)
        assert pruned == (value == 2.0)
    study.close()
    again = study_of(tmp_path / "s", sweep)
    adopted = [again.next() for _ in range(4)]
    assert [assigned.pruned_at for assigned in adopted] == [None, None, None, 2]
    assert [assigned.num_reported for assigned in adopted] == [2, 2, 2, 2]


def _die_while_asking(folder, sweep):
    study = study_of(folder, sweep)
    while True:
        study.next()


def test_kill_minus_nine_while_asking_leaves_a_study_that_resumes(tmp_path):
    sweep = sweep_of(tmp_path, parameters={f"optim.p{i}": {"min": 0.0, "max": 1.0} for i in range(5)})
    context = multiprocessing.get_context("spawn")
    journal = tmp_path / "s" / "journal.log"
    process = context.Process(target=_die_while_asking, args=(tmp_path / "s", sweep))
    process.start()
    while not journal.exists() or journal.stat().st_size < 3000:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with journal.open("ab") as handle:  # and half a line, as a full disk leaves it
        handle.write(b'{"op_code":8,"wor')
    study = study_of(tmp_path / "s", sweep)
    numbers = []
    while (assigned := study.next()) is not None:
        assert len(assigned.parameters) == 5
        numbers.append(assigned.number)
        study.finish(assigned.number, "done", 0.0, None)
    assert sorted(numbers) == list(range(20))


def test_the_best_trial_of_a_sweep_whose_name_has_a_comma_is_found_and_composes(tmp_path):
    folder = tmp_path / "a,b=(1)"
    composed = compose(["experiment=demo", "optim.lr=0.002"])
    for name, value in (("trial-0000", 2.0), ("trial,1", 1.0)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(dump(composed.config))
        (folder / name / "manifest.json").write_text(json.dumps({"choices": composed.choices}))
        (folder / name / "summary.json").write_text(json.dumps({"status": "done", "val/loss": value}))
    file, overrides = write_best(folder, sweep_of(tmp_path), [])
    assert "trial,1" in file.read_text()
    again = compose([f"hydra.searchpath=['file://{file.parents[1]}']", f"experiment={file.stem}"]).config
    assert recipe_settings(again) == recipe_settings(composed.config) == recipe_settings(compose(overrides).config)


def test_the_best_trials_file_composes_to_the_same_run(tmp_path):
    cases = [
        ["recipe=lora", "train.max_epochs=3", "data.path=数据.jsonl", "data.val_fraction=0.1", "optim.lr=1e-4"],
        ["recipe=lora", "scheduler.warmup_ratio=0.07", "data.path=a.jsonl", "model=qwen2_0_5b"],
        ["experiment=demo", "optim.lr=0.002", "optim.betas=[0.9, 0.95]", "train.max_steps=5"],
        ["experiment=balanced", "dropout=none", "scheduler=linear", "data.path=[a.jsonl,b.jsonl]"],
        ["experiment=balanced", "experiment=aggressive", "data.path=a.jsonl", "hardware=a100x4"],
        ["recipe=freeze", "optim.lr=3e-6", "freeze.layers=[0,3]", "freeze.lower_layers_ratio=0.0"],
    ]
    folder = tmp_path / "experiment"
    folder.mkdir()
    for number, words in enumerate(cases):
        composed = compose(words)
        groups, settings = fewest_overrides(composed.choices, composed.config, [])
        (folder / f"best{number}.yaml").write_text(as_experiment(groups, settings, "The best."), encoding="utf-8")
        again = compose([f"experiment=best{number}", f"hydra.searchpath=[file://{tmp_path}]"]).config
        expected = composed.config
        assert recipe_settings(
            compose([f"{n}={c}" for n, c in groups.items()] + format_overrides(settings)).config
        ) == recipe_settings(expected)
        assert recipe_settings(again) == recipe_settings(expected)
        assert again.data == expected.data
        assert again.hardware == expected.hardware


def test_a_file_is_followed_while_it_is_written_and_cut_back(tmp_path):
    tail = JsonlTail(tmp_path / "m.jsonl")
    assert tail.read() == []
    with (tmp_path / "m.jsonl").open("w") as handle:
        handle.write('{"step": 1}\n{"st')
        handle.flush()
        assert tail.read() == [{"step": 1}]
        handle.write('ep": 2}\n')
        handle.flush()
        assert tail.read() == [{"step": 1}, {"step": 2}]
    (tmp_path / "new").write_text('{"step": 1}\n')
    (tmp_path / "new").rename(tmp_path / "m.jsonl")
    assert tail.read() == [{"step": 1}]


def test_places_for_trials_share_gpus_and_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert allocate_slots(None, "auto", option="jobs") == [{}]
    assert allocate_slots(3, "auto", option="jobs") == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [s["CUDA_VISIBLE_DEVICES"] for s in allocate_slots(None, "auto", option="jobs")] == ["0", "1", "2", "3"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in allocate_slots(2, "auto", option="jobs")] == ["0,1", "2,3"]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in allocate_slots(None, 2, option="jobs")] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert allocate_slots(None, 4, option="jobs") == [{"CUDA_VISIBLE_DEVICES": "4,5,6,7"}]
    with pytest.raises(ConfigError, match=r"jobs=3 takes 6 GPUs at hardware\.devices=2, and there are 4"):
        allocate_slots(3, 2, option="jobs")
    with pytest.raises(ConfigError, match="there are 4"):
        allocate_slots(None, 8, option="jobs")


def test_the_range_test_suggests_where_the_loss_falls_fastest_and_stays_below_where_it_turns():
    lrs = [10 ** (-6 + 5 * i / 99) for i in range(100)]
    # A loss that falls around 1e-4 and climbs beyond 1e-2.
    losses = [3 - 2 / (1 + math.exp(-4 * (math.log10(r) + 4))) + 50 * max(0.0, r - 1e-2) for r in lrs]
    test = evaluate(lrs, losses)
    assert 3e-5 < test.steepest < 4e-4
    assert 1e-3 < test.lowest < 3e-2
    assert test.suggestion <= test.lowest / 3
    still = evaluate(lrs, [3 - 0.01 * i for i in range(100)])
    assert still.lowest is None
    assert "still fell at the highest" in still.reason()
    noise = random.Random(0)
    assert all(evaluate(lrs, [5 + noise.gauss(0, 0.3) for _ in lrs]).suggestion is None for _ in range(50))
    assert evaluate(lrs, [5.0] * 100).suggestion is None
    flat = evaluate(lrs, [3 + 0.01 * i for i in range(100)])
    assert flat.suggestion is None
    assert "did not fall by more than its noise" in flat.reason()


def test_sweep_files_are_w_and_bs_own_format_with_nothing_of_ours():
    for name in sweep_names():
        raw = yaml.safe_load((conf_dir() / "sweep" / f"{name}.yaml").read_text("utf-8"))
        assert set(raw) <= {"method", "metric", "early_terminate", "parameters", "command"}
        assert raw["command"][:4] == ["${env}", "${interpreter}", "-m", "qwlit"]
        assert "logger=wandb" in raw["command"]
        json.dumps(raw)


def test_the_loss_of_a_named_validation_set_may_be_the_metric_and_of_no_other(tmp_path):
    config = compose(["data.path=x.jsonl", "data.val_path={math: a.jsonl, chat: b.jsonl}"]).config
    check_metric(sweep_of(tmp_path, metric={"name": "val/math/loss"}), config)
    with pytest.raises(ConfigError, match=r"no run measures this. Did you mean 'val/math/loss'"):
        check_metric(sweep_of(tmp_path, metric={"name": "val/maths/loss"}), config)
