"""Run folders and sweeps as training leaves them, written in a moment, and a reader of the comparison's page."""

import json
import math
import random
from html.parser import HTMLParser

import yaml

from qwlit.report.comparability import comparison_warnings
from qwlit.report.compare import RunComparison, build_comparison
from qwlit.report.importance import importance
from qwlit.report.page import build_page
from qwlit.report.table import columns
from qwlit.training.tracking.run_folder import RunFolder

MANIFEST = {
    "qwlit": "0.1.0",
    "git": {"commit": "73bf86c0", "dirty": False},
    "device": "CPU",
    "devices": 1,
    "num_nodes": 1,
    "precision": "32-true",
    "attention": "sdpa",
    "determinism": "fast",
    "data": "aa11+bb22",
    "seed": 0,
}


def write_run(path, settings=None, val=1.0, *, summary=None, manifest=None, events=(), samples=(), rows=()):
    """Write a run folder as training leaves it; `settings` are dotted."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    tree = {"run": {"name": path.name, "root": str(path.parent)}, "seed": 0, "data": {"path": "/disk/chat.jsonl"}}
    for key, value in ({"optim.lr": 1} if settings is None else settings).items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    (path / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    folder.write_json("manifest.json", MANIFEST | (manifest or {}))
    usual = [{"step": 5, "train/loss": 2.0, "optim/lr": 1e-4, "optim/grad_norm": 1.0}, {"step": 10, "val/loss": val}]
    folder.write_records("metrics.jsonl", rows or usual)
    folder.write_records("events.jsonl", events)
    folder.write_records("samples.jsonl", samples)
    results = {"steps": 10, "train_loss_last": 2.0, "val_loss_best": val, "wall_seconds": 61.2}
    folder.write_summary(**{"status": "done", **results, **(summary or {})})
    return path


def write_sweep(path, trials, *, metric="val/loss", goal="minimize"):
    """Write a sweep folder; a trial is (state, value, parameters, reason)."""
    path.mkdir(parents=True)
    entries = []
    for number, (state, value, params, reason) in enumerate(trials):
        name = f"trial-{number:04d}"
        if state != "failed":
            write_run(path / name, params, value or 9.0, summary={"status": "preempted"} if state == "pruned" else None)
        entries.append({"number": number, "state": state, "value": value if state == "done" else None})
        entries[-1] |= {"params": params, "run": name, "reason": reason, "steps": 10}
    document = {"name": path.name, "method": "bayes", "metric": {"name": metric, "goal": goal}, "trials": entries}
    (path / "sweep.json").write_text(json.dumps(document), encoding="utf-8")
    return path


def comparison_of(*paths, baseline=None):
    return build_comparison([str(path) for path in paths], baseline)


def names(comparison):
    return [run.name for run in comparison.runs]


def column(comparison, title):
    return next(column.cells for column in columns(comparison) if column.title == title)


def page_of(comparison: RunComparison) -> str:
    return build_page(comparison, comparison_warnings(comparison), importance(comparison))


def searched(tmp_path, number=30, *, early=lambda lr: False):
    """Write a sweep whose metric depends on the learning rate alone."""
    draw = random.Random(0)
    trials = []
    for _ in range(number):
        params = {
            "optim.lr": 10 ** draw.uniform(-5, -3),
            "optim.weight_decay": draw.uniform(0.01, 0.1),
            "experiment": draw.choice(["balanced", "中文", "<i>"]),
            "constant": 1,
        }
        value = 1 + (math.log10(params["optim.lr"]) + 3.3) ** 2
        trials.append(("pruned" if early(params["optim.lr"]) else "done", value, params, None))
    return write_sweep(tmp_path / f"s{number}", trials)


class Page(HTMLParser):
    """Collects what a page would load or run, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.text += data


def assert_self_contained(text):
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in text and not any(f"url({start}" in text for start in ("http", "'http", '"http', "//"))
    return page
