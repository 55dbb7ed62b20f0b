"""`submit`: write the Slurm job of a run, of its seeds, or of a sweep, and pass it to sbatch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from qwlit.cluster.script import SlurmJob, check_slurm, quoted, render
from qwlit.commands.options import compose_run, own_options, typed_number
from qwlit.config.compose import Composed
from qwlit.config.overrides import format_value
from qwlit.config.run import RunConfig
from qwlit.core.errors import ConfigError
from qwlit.core.files import resolve_path, write_text_atomic

OWN = {"dry_run": ("false", "true"), "seeds": None, "repeats": None, "sweep": None, "trials": None, "tasks": None}
PROGRAMS = ("setup", "options", "container")
"""Settings of slurm.* that decide which programs the job runs beside the training."""
SCRIPTS = ".slurm"
"""Folder in run.root that keeps the submitted files."""


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, OWN)
    config, job = _sweep(own, overrides) if own["sweep"] else _runs(own, overrides)
    check_slurm(config.slurm)
    text = render(config, job, python=sys.executable, folder=Path.cwd())
    if own["dry_run"] == "true":
        print(text, end="")
    else:
        _submit(resolve_path(config.run.root) / SCRIPTS / f"{job.name}.sbatch", text)


def _runs(own: dict[str, str | None], overrides: list[str]) -> tuple[RunConfig, SlurmJob]:
    """Describe the job of one run, or an array of the same run with several seeds."""
    for key in ("trials", "tasks"):
        if own[key] is not None:
            raise ConfigError(f"{key} is an option for sweeps; set sweep=NAME as well, or leave it out")
    composed = compose_run(overrides)
    config = composed.config
    _refuse_programs_of_file(composed)
    _run_preflight(composed)
    # Write the name into the job: a requeued job must find the same run even if the default name would change.
    name = str(config.run.name)
    named = [*overrides, f"run.name={name}"]
    seeds = _seeds(own, config.seed)
    if not seeds:
        return config, SlurmJob(name, " ".join(overrides), ["train", *quoted(named)])
    fixed = [override for override in overrides if override.lstrip("+").partition("=")[0] not in ("seed", "run.name")]
    chosen = "${seeds[$SLURM_ARRAY_TASK_ID]}"
    return config, SlurmJob(
        name,
        f"seeds=[{','.join(map(str, seeds))}] {' '.join(overrides)}",
        ["train", *quoted(fixed), f"seed={chosen}", f"run.name={name}-seed{chosen}"],
        array=f"0-{len(seeds) - 1}",
        before=(f"seeds=({' '.join(str(seed) for seed in seeds)})",),
    )


def _sweep(own: dict[str, str | None], overrides: list[str]) -> tuple[RunConfig, SlurmJob]:
    """Describe an array whose tasks share the trials of a local sweep. Each task has the devices of one trial."""
    from qwlit.tuning.optuna_search import check_metric, number_of_trials, sweep_folder
    from qwlit.tuning.space import build_space, check_space
    from qwlit.tuning.sweep_file import read_sweep

    for key in ("seeds", "repeats"):
        if own[key] is not None:
            raise ConfigError(f"{key} works only for runs, not with sweep=…; remove it")
    sweep = read_sweep(str(own["sweep"]))
    composed = check_space(sweep, [*sweep.overrides, "logger=none", *overrides])
    config, name = composed.config, sweep_folder(sweep, composed, overrides).name
    if config.hardware.num_nodes > 1:
        raise ConfigError("hardware.num_nodes: a trial of a sweep runs on one node; set hardware.num_nodes=1")
    check_metric(sweep, config)
    trials = typed_number(own, "trials")
    limit = number_of_trials(sweep, build_space(sweep), trials)
    tasks = typed_number(own, "tasks") or 1
    if tasks > limit:
        raise ConfigError(
            f"tasks={tasks}: the sweep has only {limit} trials, and each task runs one at a time; lower it"
        )
    limited = [] if trials is None else [f"trials={trials}"]
    arguments = ["sweep", *quoted([f"sweep={own['sweep']}", "backend=optuna", *limited, "jobs=1", *overrides])]
    title = " ".join([f"sweep={own['sweep']}", *limited, f"tasks={tasks}", *overrides])
    return config, SlurmJob(name, title, arguments, ranks_by_srun=False, array=f"0-{tasks - 1}")


def _refuse_programs_of_file(composed: Composed) -> None:
    """Refuse shell lines, options and images of a config= file, which somebody else may have written, if not typed.

    Raises:
        ConfigError: naming the setting.
    """
    if composed.choices:
        return  # no config=
    for name in PROGRAMS:
        value = getattr(composed.config.slurm, name)
        if value and f"slurm.{name}" not in composed.typed:
            nothing = "null" if isinstance(value, str) else "[]"
            raise ConfigError(
                f"slurm.{name}={format_value(value)} is from the file of config=, and the job would run it; type"
                f" slurm.{name}=… to say what the job runs, or slurm.{name}={nothing} for nothing"
            )


def _seeds(own: dict[str, str | None], first: int) -> list[int]:
    """Return the seeds that are listed, or as many as `repeats` says from the first on; none for a single run."""
    text, repeats = own["seeds"], typed_number(own, "repeats", least=2)
    if text is None:
        return list(range(first, first + (repeats or 0)))
    if repeats is not None:
        raise ConfigError("seeds and repeats both say how many runs there are; leave one of them out")
    items = text.removeprefix("[").removesuffix("]").split(",")
    if not all(item.strip().isdecimal() for item in items):
        raise ConfigError(f"seeds={text}: give a list of whole numbers, seeds=[0,1,2]")
    seeds = [int(item) for item in items]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={text}: a seed is repeated; give each seed once")
    return seeds


def _run_preflight(composed: Composed) -> None:
    """Refuse now what `train` would refuse only after hours in the queue.

    Raises:
        ConfigError: a preflight rule refuses the run.
    """
    from qwlit.planning.facts import facts_of
    from qwlit.planning.preflight.rules import refuse, run_rules
    from qwlit.planning.setup import resolve_setup

    refuse(run_rules(facts_of(resolve_setup(composed, trust_profile=True))))


def _submit(file: Path, text: str) -> None:
    """Write the text to `file` and pass it to sbatch. The last line printed is Slurm's own.

    Raises:
        ConfigError: there is no sbatch, or it refused the job.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch on this machine; print the file with dry_run=true and submit it elsewhere"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, text)
    print(f"written to {file}")
    sys.stdout.flush()
    # Inside another Slurm job, sbatch would apply that job's SLURM_ variables to the new one.
    kept = {"SLURM_CONF", "SLURM_CLUSTERS"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key in kept}
    done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    print(done.stdout.strip())
