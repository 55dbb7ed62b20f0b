"""`sweep`: search for settings as a sweep file describes, with W&B's agents or with Optuna on this machine."""

import shlex
from typing import Any

from rich.markup import escape
from rich.table import Table

from qwlit.commands.options import own_options, typed_number
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, QwlitError

BACKENDS = ("wandb", "optuna")
ACTIONS = ("run", "best", "find_lr", "pilot", "repeat")
REPEATS = 5
SHOWN = 5


def main(arguments: list[str]) -> None:
    own, overrides = own_options(
        arguments,
        {"sweep": None, "backend": BACKENDS, "action": ACTIONS}
        | dict.fromkeys(("trials", "jobs", "agents", "repeats")),
    )
    alone = ("sweep", "trials", "jobs", "agents")
    unused: dict[str, tuple[str, ...]] = dict.fromkeys(("find_lr", "pilot"), (*alone, "repeats"))
    unused |= {"best": ("trials", "jobs", "agents", "repeats"), "run": ("repeats",), "repeat": alone}
    for key in unused[str(own["action"])]:
        if own[key] is not None:
            raise ConfigError(f"{key}={own[key]} has no effect with action={own['action']}; leave it out")
    if own["action"] == "find_lr":
        _find_lr(overrides)
        return
    if own["action"] == "pilot":
        _pilot(overrides)
        return
    if own["action"] == "repeat":
        _repeat(overrides, typed_number(own, "repeats", least=2) or REPEATS)
        return
    if own["sweep"] is None:
        from qwlit.tuning.sweep_file import sweep_names

        raise ConfigError(f"sweep is not set; choose one of {', '.join(sweep_names())}, or give a file's path")
    if own["action"] == "best":
        _best(own["sweep"], overrides)
    else:
        _run(own, overrides)


def _run(own: dict[str, str | None], overrides: list[str]) -> None:
    from qwlit.tuning.sweep_file import read_sweep

    sweep = read_sweep(str(own["sweep"]))
    trials = typed_number(own, "trials")
    if own["backend"] == "wandb":
        if own["jobs"] is not None:
            raise ConfigError(
                "jobs is an option of backend=optuna; with W&B set agents=N, one trial per agent at a time"
            )
        from qwlit.tuning.wandb_search import run_wandb

        run_wandb(sweep, overrides, trials=trials, agents=typed_number(own, "agents", least=0))
        return
    if own["agents"] is not None:
        raise ConfigError(
            "agents is an option of backend=wandb; with backend=optuna set jobs=N, trials at the same time"
        )
    from qwlit.tuning.optuna_search import run_local
    from qwlit.tuning.record import read_record

    folder = run_local(sweep, overrides, trials=trials, jobs=typed_number(own, "jobs"))
    record = read_record(folder)
    _show(record)
    screen = console()
    screen.print(f"\n[bold]sweep folder[/]  {escape(str(folder))}")
    screen.print("  sweep.json   the settings, value and end of every trial; trial-… are ordinary runs")
    screen.print(f"  report runs={escape(str(folder))}   curves, differences, which settings mattered")
    folder_overrides = [
        override for override in overrides if override.lstrip("+").startswith(("run.name=", "run.root="))
    ]
    best = shlex.join([f"sweep={own['sweep']}", "action=best", *folder_overrides])
    screen.print(f"  sweep {escape(best)}   writes the best trial as an experiment file")
    if record["best"] is None and not any(trial["state"] == "running" for trial in record["trials"]):
        reasons = [trial["reason"] for trial in record["trials"] if trial["reason"]]
        raise QwlitError(f"no trial finished with a value: {reasons[0] if reasons else 'there was none'}")


def _show(record: dict[str, Any]) -> None:
    """Print how many trials ended in each state, and the best ones."""
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


def _best(name: str, overrides: list[str]) -> None:
    from qwlit.config.compose import compose
    from qwlit.tuning.best import write_best
    from qwlit.tuning.optuna_search import sweep_folder
    from qwlit.tuning.sweep_file import read_sweep

    sweep = read_sweep(name)
    folder = sweep_folder(sweep, compose([*sweep.overrides, *overrides]), overrides)
    file, best = write_best(folder, sweep, overrides)
    print(shlex.join(best))
    typed = [override for override in overrides if override.startswith("hydra.searchpath=")]
    searched = [override.partition("=")[2].strip("[]") for override in typed]
    folders = ",".join([*searched, f"'file://{file.parents[1].resolve()}'"])
    again = shlex.join([f"experiment={file.stem}", f"hydra.searchpath=[{folders}]"])
    console(stderr=True).print(
        f"written to {escape(str(file))}; train it again with\n  python -m qwlit train {escape(again)} run.name=…"
    )


def _find_lr(overrides: list[str]) -> None:
    from qwlit.tuning.lr_range import find_lr

    test, folder = find_lr(overrides, console())
    screen = console()
    if test.suggestion is None:
        screen.print(f"[bold]no suggestion[/]: {test.reason()}")
    else:
        screen.print(f"[bold]optim.lr={test.suggestion:.1e}[/]: {test.reason()}")
    screen.print(f"  {escape(str(folder.path / 'lr_range.png'))}   loss against learning rate")


def _pilot(overrides: list[str]) -> None:
    from qwlit.tuning.pilot import rows, run_pilot

    pilot, folder = run_pilot(overrides, console())
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for column in ("optim.lr", "first loss", "last loss", "skipped", "end"):
        table.add_column(column)
    for row in rows(pilot):
        table.add_row(*(escape(str(cell)) for cell in row))
    screen = console()
    screen.print(table)
    screen.print(f"[bold]{' '.join(pilot.overrides) or 'no suggestion'}[/]: {escape(pilot.describe())}")
    screen.print(f"  {escape(str(folder.path / 'pilot.png'))}   the losses of the three runs")


def _repeat(overrides: list[str], repeats: int) -> None:
    from qwlit.commands.report import show_repeats
    from qwlit.report.compare import build_comparison
    from qwlit.tuning.repeat import train_seeds

    screen = console()
    folders = train_seeds(overrides, repeats, screen)
    show_repeats(build_comparison([str(folder) for folder in folders], None), screen)
    pattern = f"{folders[0].parent / folders[0].name.rpartition('-seed')[0]}-seed*"
    screen.print(f"  report {escape(shlex.quote(f'runs=[{pattern}]'))}   curves, and other settings beside these")
