"""`submit`: writes the Slurm job of a run, of its seeds, or of a sweep, and hands it to sbatch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from qwlit.cluster.script import Work, check_slurm, quoted, render
from qwlit.commands.help import submit_help
from qwlit.commands.words import own_words, whole_number
from qwlit.config.compose import compose
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError, QwlitError
from qwlit.core.files import resolve_path, write_text_atomic

OWN = {"dry_run": ("false", "true"), "seeds": None, "sweep": None, "trials": None, "tasks": None}
SCRIPTS = ".slurm"
"""Folder beside the runs for the files as they were submitted."""


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(submit_help(), end="")
        return 0
    own, words = own_words(arguments, OWN)
    config, work = _sweep(own, words) if own["sweep"] else _runs(own, words)
    check_slurm(config.slurm)
    text = render(config, work, python=sys.executable, folder=Path.cwd())
    if own["dry_run"] == "true":
        print(text, end="")
        return 0
    _submit(resolve_path(config.run.root) / SCRIPTS / f"{work.name}.sbatch", text)
    return 0


def _runs(own: dict[str, str | None], words: list[str]) -> tuple[RunConfig, Work]:
    """One run, or the same run with several seeds as an array."""
    for key in ("trials", "tasks"):
        if own[key] is not None:
            raise ConfigError(f"{key} is of sweeps; say sweep=NAME as well")
    config = compose(words).config
    _refuse_hopeless(words)
    # The name is said, so that a requeue finds the run whatever is derived then.
    name = str(config.run.name)
    named = [*words, f"run.name={name}"]
    if own["seeds"] is None:
        return config, Work(name, " ".join(words), ["train", *quoted(named)])
    seeds = _seeds(own["seeds"])
    chosen = "${seeds[$SLURM_ARRAY_TASK_ID]}"
    return config, Work(
        name,
        f"seeds={own['seeds']} {' '.join(words)}",
        ["train", *quoted(words), f"seed={chosen}", f"run.name={name}-seed{chosen}"],
        array=f"0-{len(seeds) - 1}",
        before=(f"seeds=({' '.join(str(seed) for seed in seeds)})",),
    )


def _sweep(own: dict[str, str | None], words: list[str]) -> tuple[RunConfig, Work]:
    """A local sweep whose trials are shared by the tasks of an array, each with the devices of one trial."""
    from qwlit.tuning.optuna_search import check_metric, number_of_trials, sweep_folder
    from qwlit.tuning.space import build_space, check_space
    from qwlit.tuning.sweep_file import read_sweep

    if own["seeds"] is not None:
        raise ConfigError("seeds is of runs; a sweep tries what its file says")
    sweep = read_sweep(str(own["sweep"]))
    composed = check_space(sweep, [*sweep.words, "logger=none", *words])
    config, name = composed.config, sweep_folder(sweep, composed, words).name
    if config.hardware.num_nodes > 1:
        raise ConfigError("hardware.num_nodes: a trial of a sweep runs on one node")
    check_metric(sweep, config)
    trials = whole_number(own, "trials")
    limit = number_of_trials(sweep, build_space(sweep), trials)
    tasks = whole_number(own, "tasks") or 1
    if tasks > limit:
        raise ConfigError(f"tasks={tasks} is more than the sweep has trials, {limit}; each task runs one at a time")
    said = [] if trials is None else [f"trials={trials}"]
    sweep_words = ["sweep", *quoted([f"sweep={own['sweep']}", "backend=optuna", *said, "jobs=1", *words])]
    title = " ".join([f"sweep={own['sweep']}", *said, f"tasks={tasks}", *words])
    return config, Work(name, title, sweep_words, ranks_by_srun=False, array=f"0-{tasks - 1}")


def _seeds(text: str) -> list[int]:
    words = text.removeprefix("[").removesuffix("]").split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"seeds={text}: give a list of whole numbers, seeds=[0,1,2]")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={text}: each seed once")
    return seeds


def _refuse_hopeless(words: list[str]) -> None:
    """Refuse now what `train` would refuse after hours in the queue.

    Raises:
        ConfigError: as `train` would.
    """
    from qwlit.planning.facts import facts_of
    from qwlit.planning.preflight import find, refuse
    from qwlit.planning.setup import resolve_setup

    refuse(find(facts_of(resolve_setup(compose(words), imagined=True))))


def _submit(file: Path, text: str) -> None:
    """Keep the text in `file`, and hand that to sbatch; Slurm's own line is the last.

    Raises:
        QwlitError: there is no sbatch, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("there is no sbatch here; dry_run=true prints the file, to be submitted where there is one")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, text)
    print(f"written to {file}")
    sys.stdout.flush()
    # What is said of the submitter's own job would be taken for the new one's.
    kept = {"SLURM_CONF", "SLURM_CLUSTERS"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key in kept}
    done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise QwlitError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    print(done.stdout.strip())
