"""`sweep`: searches for settings by one file, with W&B's agents or with Optuna on this machine."""

import shlex
from typing import Any

from rich.markup import escape
from rich.table import Table

from qwlit.commands.help import sweep_help
from qwlit.commands.words import own_words, whole_number
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, QwlitError, nearest

BACKENDS = ("wandb", "optuna")
ACTIONS = ("run", "best", "find_lr")
SHOWN = 5


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(sweep_help(), end="")
        return 0
    own, words = own_words(
        arguments,
        {"sweep": None, "backend": BACKENDS, "action": ACTIONS, "trials": None, "jobs": None, "agents": None},
    )
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option.{nearest(word, ['--help'])} Settings are key=value")
    idle = {"find_lr": ("sweep", "trials", "jobs", "agents"), "best": ("trials", "jobs", "agents"), "run": ()}
    for key in idle[str(own["action"])]:
        if own[key] is not None:
            raise ConfigError(f"{key}={own[key]} means nothing to action={own['action']}; leave it out")
    if own["action"] == "find_lr":
        return _find_lr(words)
    if own["sweep"] is None:
        from qwlit.tuning.sweep_file import sweep_names

        raise ConfigError(f"sweep is not set; choose one of {', '.join(sweep_names())}, or give a file's path")
    if own["action"] == "best":
        return _best(own["sweep"], words)
    return _run(own, words)


def _run(own: dict[str, str | None], words: list[str]) -> int:
    from qwlit.tuning.sweep_file import read_sweep

    sweep = read_sweep(str(own["sweep"]))
    trials = whole_number(own, "trials")
    if own["backend"] == "wandb":
        if own["jobs"] is not None:
            raise ConfigError("jobs is of backend=optuna; with W&B's agents say agents=N, one trial each at a time")
        from qwlit.tuning.wandb_search import run_wandb

        run_wandb(sweep, words, trials=trials, agents=whole_number(own, "agents", least=0))
        return 0
    if own["agents"] is not None:
        raise ConfigError("agents is of backend=wandb; with backend=optuna say jobs=N, trials side by side")
    from qwlit.tuning.optuna_search import run_local
    from qwlit.tuning.record import read_record

    folder = run_local(sweep, words, trials=trials, jobs=whole_number(own, "jobs"))
    record = read_record(folder)
    _show(record)
    screen = console()
    screen.print(f"\n[bold]where everything lies[/]  {escape(str(folder))}")
    screen.print("  sweep.json   every trial: settings, value, how it ended; trial-… are ordinary runs")
    screen.print(f"  report runs={escape(str(folder))}   curves, what differed, which settings mattered")
    place = [word for word in words if word.lstrip("+").startswith(("run.name=", "run.root="))]
    best = shlex.join([f"sweep={own['sweep']}", "action=best", *place])
    screen.print(f"  sweep {escape(best)}   the best trial as an experiment file")
    if record["best"] is None and not any(trial["state"] == "running" for trial in record["trials"]):
        reasons = [trial["reason"] for trial in record["trials"] if trial["reason"]]
        raise QwlitError(f"no trial ended well: {reasons[0] if reasons else 'there was none'}")
    return 0


def _show(record: dict[str, Any]) -> None:
    """Print how many trials ended how, and the best ones."""
    trials, metric = record["trials"], record["metric"]
    ends = [trial["state"] for trial in trials]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    screen = console()
    screen.print(f"\n[bold]{escape(record['name'])}[/]: {len(trials)} trials, {counts}")
    done = [trial for trial in trials if trial["state"] == "done"]
    if not done:
        return
    done.sort(key=lambda trial: trial["value"], reverse=metric["goal"] == "maximize")
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("trial", metric["name"], *done[0]["params"]):
        table.add_column(escape(column), justify="right")
    for trial in done[:SHOWN]:
        values = [f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in trial["params"].values()]
        table.add_row(str(trial["number"]), f"{trial['value']:.4f}", *values)
    screen.print(table)


def _best(name: str, words: list[str]) -> int:
    from qwlit.config.compose import compose
    from qwlit.tuning.best import write_best
    from qwlit.tuning.optuna_search import sweep_folder
    from qwlit.tuning.sweep_file import read_sweep

    sweep = read_sweep(name)
    folder = sweep_folder(sweep, compose([*sweep.words, *words]), words)
    file, overrides = write_best(folder, sweep, words)
    print(shlex.join(overrides))
    searched = [word.partition("=")[2].strip("[]") for word in words if word.startswith("hydra.searchpath=")]
    folders = ",".join([*searched, f"'file://{file.parents[1].resolve()}'"])
    again = shlex.join([f"experiment={file.stem}", f"hydra.searchpath=[{folders}]"])
    console(stderr=True).print(
        f"written to {escape(str(file))}; train it again with\n  python -m qwlit train {escape(again)} run.name=…"
    )
    return 0


def _find_lr(words: list[str]) -> int:
    from qwlit.tuning.lr_range import find_lr

    test, folder = find_lr(words, console())
    screen = console()
    if test.suggestion is None:
        screen.print(f"[bold]no suggestion[/]: {test.reason()}")
    else:
        screen.print(f"[bold]optim.lr={test.suggestion:.1e}[/]: {test.reason()}")
    screen.print(f"  {escape(str(folder.path / 'lr_range.png'))}   loss against learning rate")
    return 0
