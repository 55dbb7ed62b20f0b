"""Run folders, checkpoints, sweep files and sweep folders of somebody else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.faults.artefacts import (
    CANARY,
    CODE,
    ESCAPES,
    RUN,
    SMALL,
    Artefact,
    Canary,
    all_of,
    change,
    link,
    nested,
    write,
)

SAVING = ["checkpoint.every_steps=2", "checkpoint.each_epoch=false", "checkpoint.keep_last=9"]
RESUME = ["train", *SMALL, "model.path=model", "run.name=a", *SAVING]
REPORT = ["report", "runs=[runs/a]"]
SUBMIT = ["submit", "config=runs/a/config.yaml", "dry_run=true"]
AGAIN = ["plan", "config=runs/a/config.yaml"]
SWEEP = ["sweep", "sweep=search.yaml", "run.root=runs"]
RUN_SWEEP = [*SWEEP, "backend=optuna", "trials=1"]
BEST = [*SWEEP, "action=best"]
REPORT_SWEEP = ["report", "runs=[runs/search]"]
CHECKPOINT = "runs/a/checkpoints/step-000002"
TAG = "!!python/object/apply:os.mkdir ['" + CANARY + "']"
MARKUP = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def in_run(name: str, content: str, words: list[str] = REPORT, says: str | None = None) -> Artefact:
    return Artefact(words, write(f"runs/a/{name}", content), says)


def config(text: str, says: str | None) -> Artefact:
    """A run's config.yaml with these lines."""

    def make(place: Path) -> None:
        with (place / "runs/a/config.yaml").open("a") as file:
            file.write(text + "\n")

    return Artefact(AGAIN, make, says)


def in_config(says: str | None, **settings: Any) -> Artefact:
    """A run's config.yaml with other values; section__key names a setting."""

    def make(place: Path) -> None:
        file = place / "runs/a/config.yaml"
        tree = yaml.safe_load(file.read_text())
        for key, value in settings.items():
            section, _, name = key.partition("__")
            tree[section][name] = value
        file.write_text(yaml.safe_dump(tree))

    return Artefact(AGAIN, make, says)


def pickled_state(place: Path) -> None:
    torch.save({"callbacks": Canary()}, place / CHECKPOINT / "training_state.pt")


def listed(name: str) -> Callable[[Path], object]:
    files = {name: {"bytes": 0, "sha256": ""}}
    return change(f"{CHECKPOINT}/MANIFEST.json", files=files)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


RUNS = {
    "a state that is a pickle": Artefact(RESUME, pickled_state, "no good checkpoint"),
    "a manifest that lists a path": Artefact(RESUME, listed("../../config.yaml"), "no good checkpoint"),
    "a manifest that lists a device": Artefact(RESUME, listed("/dev/zero"), "no good checkpoint"),
    "a manifest that lists an escape": Artefact(RESUME, listed(ESCAPES), "no good checkpoint"),
    "a checkpoint that is a link": Artefact(
        RESUME, all_of(lambda place: shutil.rmtree(place / CHECKPOINT), link(CHECKPOINT, "/etc")), "no good checkpoint"
    ),
    "a pointer out of the run": Artefact(RESUME, link("runs/a/checkpoints/last", "../../../model")),
    "facts whose contents are a text": Artefact(RESUME, change("runs/a/manifest.json", contents="x"), "manifest.json"),
    "facts whose contents are a list": Artefact(
        RESUME, change("runs/a/manifest.json", contents=["x"]), "manifest.json"
    ),
    "facts whose contents are numbers": Artefact(RESUME, change("runs/a/manifest.json", contents={"data.path": 1})),
    "facts whose data is an object": Artefact(RESUME, change("runs/a/manifest.json", data={"a": [ESCAPES]}), "changed"),
    "facts that are nested": in_run("manifest.json", nested(10**5), RESUME, "manifest.json"),
    "a summary whose status is a list": Artefact(RESUME, change("runs/a/summary.json", status=["running"])),
    "a summary that is a list": in_run("summary.json", "[1]", RESUME),
    "a summary of a job with an escape": Artefact(RESUME, change("runs/a/summary.json", job=ESCAPES, steps=ESCAPES)),
    "events of another kind": in_run(
        "events.jsonl",
        lines({"step": "x", "event": 7}, [1], {"event": "checkpoint", "step": None}),
        RESUME,
        None,
    ),
    "metrics of another kind": in_run(
        "metrics.jsonl", lines({"step": 2, "val/loss": "x"}, {"step": 2, "val/loss": {}}, {"step": [2]}, 7), RESUME
    ),
    "events that are a link to a file": Artefact(
        RESUME, link("runs/a/events.jsonl", "../../search.yaml"), "events.jsonl links to"
    ),
    "a lock of another kind": Artefact(RESUME, write("runs/.locks/a", ESCAPES * 9)),
    "a lock that is a folder": Artefact(
        RESUME,
        all_of(lambda place: (place / "runs/.locks/a").unlink(missing_ok=True), write("runs/.locks/a/x", "")),
        "runs",
    ),
    "a run's other settings with an escape": Artefact(RESUME, in_config(None, run__name=ESCAPES).make, "run.name="),
}

REPORTED = {
    "a summary of wrong values": Artefact(
        REPORT,
        change("runs/a/summary.json", status=ESCAPES, steps={}, val_loss_best="x", wall_seconds=[1], rollbacks={}),
    ),
    "a summary of huge values": Artefact(
        REPORT, change("runs/a/summary.json", steps=10**39, val_loss_best=1e308, wall_seconds=-(10**30))
    ),
    "a summary that is nested": in_run("summary.json", nested(10**5)),
    "an evaluation that is nested": in_run("evaluation.json", nested(10**5)),
    "an evaluation of markup": in_run(
        "evaluation.json", json.dumps({"quality": {MARKUP: {MARKUP: [{"score": 10**39, "low": ESCAPES}]}}})
    ),
    "facts whose plan and samples are of other kinds": Artefact(
        REPORT,
        change("runs/a/manifest.json", plan=[MARKUP], samples={"number": ESCAPES, "tokens": {"percentiles": [2**70]}}),
    ),
    "facts with markup": Artefact(
        REPORT, change("runs/a/manifest.json", device=MARKUP, packages={"torch": MARKUP}, choices={"model": MARKUP})
    ),
    "facts with escapes": Artefact(
        REPORT,
        change("runs/a/manifest.json", device=ESCAPES, precision=[ESCAPES], git={"commit": ESCAPES}, devices=2**70),
    ),
    "metrics with escapes": in_run("metrics.jsonl", lines({"step": 1, ESCAPES: 1.0, MARKUP: 2.0, "train/loss": 3.0})),
    "metrics of huge values": in_run(
        "metrics.jsonl", lines(*({"step": step, "train/loss": 10**39, "val/loss": 1e308} for step in (0, -5, 2**62)))
    ),
    "metrics that are no numbers": in_run(
        "metrics.jsonl", lines({"step": True, "val/loss": [1]}, {"step": 1e400}, "x")
    ),
    "events with escapes": in_run(
        "events.jsonl", lines({"step": 1, "event": ESCAPES, "message": ESCAPES}, {"step": 10**30, "event": MARKUP})
    ),
    "events whose message is an object": in_run(
        "events.jsonl", lines({"step": 1, "event": "rollback", "message": {"a": 1}}, {"step": 2, "event": "damaged"})
    ),
    "settings with a tag": in_run("config.yaml", f"model: {TAG}\n"),
    "settings with a bomb": in_run("config.yaml", BOMB),
    "settings with an escape": in_run(
        "config.yaml", yaml.safe_dump({"model": {ESCAPES: ESCAPES}, MARKUP: {"a": MARKUP}})
    ),
    "settings whose paths are objects": in_run(
        "config.yaml", "data: {path: [{path: [1]}, 7, {x: 1}], val_path: {a: {}}}"
    ),
    "a run with markup in its name": Artefact(
        ["report", "runs=[runs/*]"], lambda place: shutil.copytree(place / "runs/a", place / "runs/<script>alert(1)")
    ),
    "a run with an escape in its name": Artefact(
        ["report", "runs=[runs/*]"], lambda place: shutil.copytree(place / "runs/a", place / f"runs/{ESCAPES[:8]}\n")
    ),
    "a run whose files are devices": Artefact(
        REPORT,
        all_of(*(link(f"runs/a/{name}", "/dev/zero") for name in ("summary.json", "manifest.json", "metrics.jsonl"))),
    ),
    "a run whose settings and events are devices": Artefact(
        REPORT, all_of(*(link(f"runs/a/{name}", "/dev/zero") for name in ("config.yaml", "events.jsonl")))
    ),
    "a run whose files are this process": Artefact(
        REPORT, all_of(*(link(f"runs/a/{name}", "/proc/self/environ") for name in ("config.yaml", "events.jsonl")))
    ),
}

SETTINGS = {
    "settings that apply a function": config(f"x: {TAG}", "tag"),
    "settings that name a class": config("x: !!python/name:os.system", "tag"),
    "settings with a tag of their own": config("x: !evil 7", "tag"),
    "settings with a target": config(f"_target_: os.mkdir\npath: {CANARY}", "_target_"),
    "settings with aliases that multiply": config(BOMB, "values"),
    "settings with a cycle": config("x: &x [*x]", "inside of"),
    "settings that merge themselves": config("x: &x {<<: *x}", "inside of"),
    "nested settings": config("x: " + nested(999), "levels"),
    "settings that name a key twice": config("seed: 7", "duplicate"),
    "settings with a number of 10^5 digits": config("x: " + "9" * 10**5, "number"),
    "settings with a date of nobody": config("x: 9999-99-99", "no such setting"),
    "settings with an escape": config(f'x: "{ESCAPES.encode("unicode_escape").decode()}"', "no such"),
    "settings with raw escapes": config(f"x: {ESCAPES}", "cannot be read"),
    "settings with two documents": config("---\nseed: 1", "cannot be read"),
    "a data path that reads a secret": Artefact(
        ["inspect", *AGAIN[1:]],
        in_config("WANDB_API_KEY", data__path="${oc.env:WANDB_API_KEY}.jsonl").make,
        "WANDB_API_KEY",
    ),
    "a model path that reads a secret": in_config("WANDB_API_KEY", model__path="${oc.env:WANDB_API_KEY}"),
    "a project that decodes": in_config(None, logger__project="${oc.decode:'x'}"),
    "a model that is code": in_config("model.", model__path={"_target_": "os.mkdir", "path": CANARY}),
    "a path with a null byte": in_config("model", model__path="a\0b"),
    "data with a null byte": Artefact(["inspect", *AGAIN[1:]], in_config("data", data__path="a\0b.jsonl").make, "data"),
    "a template that is a path": in_config("data.template", data__template="../../x"),
    "settings with lines for the shell": Artefact(
        SUBMIT, in_config(None, slurm__setup=[f"mkdir {CANARY}"]).make, "slurm.setup"
    ),
    "settings with an image": Artefact(SUBMIT, in_config(None, slurm__container="evil/image").make, "slurm.container"),
    "settings with lines of a batch file": Artefact(
        SUBMIT, in_config(None, slurm__partition=f"a\nmkdir {CANARY}").make, "slurm.partition"
    ),
    "a run out of its root": in_config("run.name", run__name="../../x"),
    "a model of nobody's home": in_config("no such user", model__path="~nobody-here/x"),
}


def sweep(says: str | None, words: list[str] = RUN_SWEEP, **entries: Any) -> Artefact:
    """A sweep file with other entries, for a new folder."""

    def make(place: Path) -> None:
        document = yaml.safe_load((place / "search.yaml").read_text())
        (place / "search.yaml").write_text(yaml.safe_dump(document | entries))

    return Artefact([*words, "run.name=another"] if words is RUN_SWEEP else words, make, says)


def parameters(says: str, **values: Any) -> Artefact:
    return sweep(says, method="grid", parameters={key.replace("__", "."): value for key, value in values.items()})


def command(*words: str, says: str | None) -> Artefact:
    return sweep(says, command=[*words, "${args_no_hyphens}"])


OWN = ["${env}", "${interpreter}", "-m", "qwlit", "train"]
SWEEPS = {
    "a sweep with a tag": Artefact(RUN_SWEEP, write("search.yaml", f"method: {TAG}\n"), "tag"),
    "a sweep that is a device": Artefact(RUN_SWEEP, link("search.yaml", "/dev/zero"), "no such sweep"),
    "a sweep with a bomb": Artefact(RUN_SWEEP, write("search.yaml", BOMB), "values"),
    "a sweep with an escape": sweep("method", method=ESCAPES),
    "a sweep with a metric of two lines": sweep(
        "metric", metric={"name": f"val/loss\ndefaults: [{ESCAPES}]", "goal": "minimize"}
    ),
    "a sweep whose command is another program": command(
        "bash", "-c", f"mkdir {CANARY}", "qwlit", "train", says="command"
    ),
    "a sweep whose command runs code first": command(
        "${interpreter}", "-c", RUN, "-m", "qwlit", "train", says="command"
    ),
    "a sweep whose command runs code at W&B": sweep(
        "command",
        words=[*SWEEP, "backend=wandb", "agents=0"],
        command=["bash", "-c", f"mkdir {CANARY}", "qwlit", "train", "${args_no_hyphens}"],
    ),
    "a sweep whose command imports a package": command(*OWN, "hydra.searchpath=[pkg://evil]", says="hydra.searchpath"),
    "a sweep whose command reads a secret": command(*OWN, "seed=${oc.env:WANDB_API_KEY}", says="WANDB_API_KEY"),
    "a sweep whose command is a number": sweep("command", command=7),
    "a sweep over code": parameters("_target_", _target_={"values": ["os.mkdir"]}),
    "a sweep over a secret": parameters("WANDB_API_KEY", seed={"values": ["${oc.env:WANDB_API_KEY}"]}),
    "a sweep over folders of settings": parameters("hydra.searchpath", hydra__searchpath={"values": ["pkg://evil"]}),
    "a sweep over runs": parameters("run.root", run__root={"values": ["../../x"]}),
    "a sweep over settings with an escape": parameters("search.yaml", **{ESCAPES: {"values": [1]}}),
    "a sweep over values with an escape": parameters("optim.name", optim__name={"values": [ESCAPES]}),
    "a sweep over 10^12 points": parameters("points", seed={"min": 0, "max": 10**12}),
    "a sweep over 10^12 multiples": parameters(
        "points", optim__weight_decay={"min": 0.0, "max": 1.0, "q": 1e-12, "distribution": "q_uniform"}
    ),
    "a sweep over 10^9 combinations": parameters(
        "points", **{key: {"min": 1, "max": 1000} for key in ("seed", "train__max_steps", "train__global_batch_size")}
    ),
    "a sweep over multiples of NaN": parameters("q", optim__lr={"min": 0.0, "max": 1.0, "q": float("nan")}),
    "a sweep from minus infinity": sweep("min", parameters={"optim.lr": {"min": float("-inf"), "max": 1.0}}),
    "a sweep to 10^400": sweep("search.yaml", parameters={"seed": {"min": 0, "max": 10**99}}),
    "a sweep of powers of 10^9": sweep(
        "search.yaml", parameters={"optim.lr": {"min": 1.0, "max": 1e9, "distribution": "log_uniform"}}
    ),
}


def record(says: str | None, words: list[str] = BEST, **entries: Any) -> Artefact:
    return Artefact(words, change("runs/search/sweep.json", **entries), says)


def best_trial(says: str | None, words: list[str] = BEST, **entries: Any) -> Artefact:
    """A record whose only trial has other entries."""

    def make(place: Path) -> None:
        file = place / "runs/search/sweep.json"
        document = json.loads(file.read_text())
        document["trials"][0] |= entries
        file.write_text(json.dumps(document))

    return Artefact(words, make, says)


def facts_of_best(says: str | None, **entries: Any) -> Artefact:
    return Artefact(BEST, change("runs/search/trial-0000/manifest.json", **entries), says)


def journal(text: str, says: str | None) -> Artefact:
    def make(place: Path) -> None:
        with (place / "runs/search/journal.log").open("a") as file:
            file.write(text + "\n")

    return Artefact(RUN_SWEEP, make, says)


def without_record(place: Path) -> None:
    (place / "runs/search/sweep.json").unlink()


JSON, JOURNAL = "sweep.json", "journal.log"
ATTRIBUTE = {"op_code": 8, "worker_id": "x", "trial_id": 0}
RECORDS = {
    "a record that is nested": Artefact(BEST, write("runs/search/sweep.json", nested(10**5)), JSON),
    "a record that is a device": Artefact(BEST, link("runs/search/sweep.json", "/dev/zero"), JSON),
    "a journal that is a device": Artefact(RUN_SWEEP, link("runs/search/journal.log", "/dev/zero"), JOURNAL),
    "a record whose trials are numbers": record(JSON, trials=[1]),
    "a record whose trials are an object": record(JSON, trials={"a": 1}),
    "a record whose trials are a text": record(JSON, trials=ESCAPES),
    "a record whose best is an object": record(JSON, best={"a": 1}),
    "a record whose best is an escape": record(JSON, best=ESCAPES),
    "a record whose best is not there": record("no finished trial", best=9),
    "a record whose metric is a text": record(JSON, metric="x"),
    "a record whose settings are a list": record(JSON, RUN_SWEEP, settings=["x"]),
    "a record whose file is a list": record(JSON, RUN_SWEEP, file=["x"]),
    "a record whose settings have escapes": record("another sweep", RUN_SWEEP, settings={ESCAPES: ESCAPES}),
    "a trial outside of the sweep": best_trial(JSON, REPORT_SWEEP, run="../../elsewhere"),
    "a trial of the system": best_trial(JSON, REPORT_SWEEP, run="/etc"),
    "a trial with a null byte": best_trial(JSON, REPORT_SWEEP, run="a\0b"),
    "a trial that is a list": best_trial(JSON, run=["x"]),
    "a trial whose number is a text": best_trial(JSON, number="0"),
    "a trial whose value is a text": best_trial(JSON, value="x"),
    "a trial whose value is an object": best_trial(JSON, value={"a": 1}),
    "a trial whose steps are a text": best_trial(JSON, RUN_SWEEP, steps=ESCAPES),
    "a trial whose state is an escape": best_trial(None, REPORT_SWEEP, state=ESCAPES, reason=ESCAPES),
    "a trial with parameters of another kind": best_trial(JSON, REPORT_SWEEP, params=7),
    "a best trial outside of the sweep": best_trial(None, run="../../elsewhere"),
    "a best trial that is not there": Artefact(
        BEST,
        all_of(best_trial(None, number=9).make, record(None, best=9).make),
        "trial-0009",
    ),
    "a trial without facts": Artefact(
        BEST, lambda place: (place / "runs/search/trial-0000/manifest.json").unlink(), "manifest.json"
    ),
    "a trial whose facts are a list": Artefact(
        BEST, write("runs/search/trial-0000/manifest.json", "[]"), "manifest.json"
    ),
    "a trial whose facts are nested": Artefact(
        BEST, write("runs/search/trial-0000/manifest.json", nested(10**5)), "manifest.json"
    ),
    "a trial whose choices are a list": facts_of_best("manifest.json", choices=["x"]),
    "a trial whose choices are objects": facts_of_best("manifest.json", choices={"recipe": {"a": 1}}),
    "a trial that chooses folders": facts_of_best("manifest.json", choices={"hydra.searchpath": "pkg://evil"}),
    "a trial that chooses a path": facts_of_best("recipe", choices={"recipe": "../../evil"}),
    "a trial that chooses an escape": facts_of_best("recipe", choices={"recipe": ESCAPES}),
    "a trial that chooses settings": facts_of_best("manifest.json", choices={"+x": "${oc.env:WANDB_API_KEY}"}),
    "a trial whose settings are code": Artefact(
        BEST, write("runs/search/trial-0000/config.yaml", f"_target_: {TAG}\n"), "config.yaml"
    ),
    "runs whose metrics are texts": Artefact(
        BEST,
        all_of(without_record, write("runs/search/trial-0000/metrics.jsonl", lines({"step": 1, "train/loss": "x"}))),
        "no sweep with a finished trial",
    ),
    "runs whose metrics are objects": Artefact(
        BEST,
        all_of(without_record, write("runs/search/trial-0000/metrics.jsonl", lines({"step": 1, "train/loss": [{}]}))),
        "no sweep with a finished trial",
    ),
    "a journal of no JSON": journal(ESCAPES, JOURNAL),
    "a journal of a list": journal("[1]", JOURNAL),
    "a journal of another operation": journal('{"op_code": 99, "worker_id": "x"}', JOURNAL),
    "a journal of another trial": journal('{"op_code": 6, "worker_id": "x", "trial_id": 99, "state": 1}', None),
    "a journal that is nested": journal(nested(10**5), JOURNAL),
    "a journal whose owner is a path": journal(
        json.dumps({"op_code": 4, "worker_id": "x", "study_id": 0, "datetime_start": None})
        + "\n"
        + json.dumps(ATTRIBUTE | {"trial_id": 1, "user_attr": {"owner": "../../../model/config.json"}}),
        JOURNAL,
    ),
    "a journal whose outcome is an escape": journal(json.dumps(ATTRIBUTE | {"user_attr": {"reason": ESCAPES}}), None),
    "a journal that is a pickle": Artefact(
        RUN_SWEEP, lambda place: torch.save(Canary(), place / "runs/search/journal.log"), JOURNAL
    ),
    "a sweep folder that is code": Artefact(
        BEST, all_of(write("runs/search/conf/experiment/search_best.yaml", TAG), write("evil.py", CODE))
    ),
}

FOLDERS = RUNS | REPORTED | SETTINGS | SWEEPS | RECORDS
