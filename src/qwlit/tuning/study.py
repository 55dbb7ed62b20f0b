"""The trials of a local sweep. Optuna draws them; a journal keeps them for all machines, also after kill -9."""

import contextlib
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from qwlit.core.errors import ConfigError, naming_errors
from qwlit.core.files import is_locked, locked
from qwlit.tuning.space import Space, grid_points
from qwlit.tuning.sweep_file import EarlyTerminate, Sweep

Outcome = Literal["done", "pruned", "diverged", "failed"]
# Diverged trials count as pruned: TPE ranks pruned trials below all finished ones, so it avoids such settings.
STATES = {
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
STUDY = "sweep"


class _Attributes(TypedDict, total=False):
    """What qwlit writes about a trial into the journal."""

    owner: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    outcome: Outcome
    reason: str
    pruned_at: int


@dataclass(frozen=True)
class AssignedTrial:
    """A trial that `Study.next` has assigned to this process."""

    number: int
    parameters: dict[str, Any]
    pruned_at: int | None
    """The value of the metric that pruned the trial, counted from 1, if the process that ran it ended before it closed
    the trial."""
    num_reported: int
    """Number of values of the metric that the study already has."""


class _FileLock:
    """The journal's lock. The system frees it when its holder is killed; Optuna's own lock would stay for 30 s."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = contextlib.ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(locked(self._path))
        return True

    def release(self) -> None:
        self._held.close()


class Study:
    """The trials of one sweep. Every change is written to the journal before it takes effect."""

    def __init__(self, folder: Path, sweep: Sweep, space: Space, *, trials: int, seed: int) -> None:
        """Open or create the study. `trials` is the number in all, over every machine and restart.

        Raises:
            ConfigError: the journal cannot be read.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._folder = folder
        self._sweep = sweep
        self._space = space
        self._limit = trials
        self._seed = seed
        journal, lock = folder / "journal.log", folder / ".journal.lock"
        backend = JournalFileBackend(str(journal), lock_obj=_FileLock(lock))  # type: ignore[arg-type]
        pruner = _pruner(sweep.document.early_terminate)
        with naming_errors(lambda reason: ConfigError(f"{journal} cannot be read ({reason}); set another run.name")):
            _cut_unfinished_line(journal, lock)
            self._storage = JournalStorage(backend)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=STUDY,
                direction=sweep.document.metric.goal,
                pruner=pruner,
                load_if_exists=True,
            )
            _check(self.trials)
        self._id = self._storage.get_study_id_from_name(STUDY)
        self._owner = uuid.uuid4().hex
        self._alive = contextlib.ExitStack()
        self._alive.enter_context(locked(self._owner_file(self._owner)))

    def close(self) -> None:
        """Release the trials that this process runs, so that another process can resume them."""
        self._alive.close()
        self._owner_file(self._owner).unlink(missing_ok=True)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def next(self) -> AssignedTrial | None:
        """Return an unfinished trial that no process runs, else a new trial; None if there are enough."""
        with self._exclusively():
            trials = self.trials
            orphan = next((t for t in trials if t.state == TrialState.RUNNING and not self._is_owned(t)), None)
            if orphan is None and len(trials) >= self._limit:
                return None
            number = len(trials) if orphan is None else orphan.number
            self._study.sampler = self._sampler(number)
            # The process that ran it may have ended before it drew all parameters: Optuna returns those already drawn.
            trial = Trial(self._study, self._trial_id(number)) if orphan else self._study.ask()
            parameters = {name: _draw(trial, name, self._space) for name in self._space}
            trial.set_user_attr("owner", self._owner)
            reported = len(orphan.intermediate_values) if orphan else 0
            return AssignedTrial(number, parameters, trial.user_attrs.get("pruned_at"), reported)

    def report(self, number: int, count: int, value: float) -> bool:
        """Record the `count`-th value of the metric. Return whether the trial is to be pruned."""
        if not math.isfinite(value):
            return False  # the guard handles values that are not finite
        trial_id = self._trial_id(number)
        self._storage.set_trial_intermediate_value(trial_id, count, value)
        with self._exclusively():
            pruned = self._study.pruner.prune(self._study, self._storage.get_trial(trial_id))
        if pruned:
            self._storage.set_trial_user_attr(trial_id, "pruned_at", count)
        return pruned

    def finish(self, number: int, outcome: Outcome, value: float | None, reason: str | None) -> None:
        """Close a trial. Only a trial that is done has a value."""
        trial_id = self._trial_id(number)
        self._storage.set_trial_user_attr(trial_id, "outcome", outcome)
        if reason:
            self._storage.set_trial_user_attr(trial_id, "reason", reason)
        # Not `Study.tell`: after the grid's last point it would stop Optuna's own loop, which qwlit does not run.
        values = [value] if outcome == "done" and value is not None else None
        self._storage.set_trial_state_values(trial_id, STATES[outcome], values)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def _exclusively(self) -> contextlib.AbstractContextManager[Any]:
        """Lock the study over all machines, so that no grid point is drawn twice and no trial is one too many."""
        return locked(self._folder / ".ask.lock")

    def _owner_file(self, owner: str) -> Path:
        return self._folder / ".owners" / owner

    def _is_owned(self, trial: FrozenTrial) -> bool:
        """Whether the process that took the trial is alive: it holds a lock until it ends."""
        owner = trial.user_attrs.get("owner")
        return owner is not None and self._owner_file(owner).exists() and is_locked(self._owner_file(owner))

    def _sampler(self, number: int) -> BaseSampler:
        """Return the sampler of trial `number`, seeded by the study's seed and the number: a restart draws the same."""
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        if self._sweep.document.method == "grid":
            return GridSampler(grid_points(self._space), seed=self._seed)
        return TPESampler(seed=seed) if self._sweep.document.method == "bayes" else RandomSampler(seed=seed)


def _check(trials: list[FrozenTrial]) -> None:
    """Raise an error if the journal holds values of other kinds: Optuna takes them as they are."""
    for trial in trials:
        TypeAdapter(_Attributes).validate_python(trial.user_attrs, strict=True)
        TypeAdapter(dict[int, FiniteFloat]).validate_python(trial.intermediate_values, strict=True)
        TypeAdapter(list[FiniteFloat] | None).validate_python(trial.values, strict=True)


def _draw(trial: Trial, name: str, space: Space) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    match space[name]:
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
        case IntDistribution(low=low, high=high, step=step):
            return trial.suggest_int(name, low, high, step=step)
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)


def _pruner(rule: EarlyTerminate | None) -> BasePruner:
    """Return the pruner that decides after min_iter · eta^k values, as W&B's hyperband does (ASHA, Li et al. 2020)."""
    if rule is None:
        return NopPruner()
    if rule.strict:
        raise ConfigError("early_terminate.strict=true: only W&B supports it; leave it out, or use backend=wandb")
    if rule.min_iter is not None:
        first = rule.min_iter
    elif rule.max_iter is not None:
        first = max(1, rule.max_iter // rule.eta ** (rule.s or 2))
    else:
        raise ConfigError("early_terminate: give min_iter, or max_iter and s")
    return SuccessiveHalvingPruner(min_resource=first, reduction_factor=rule.eta)


def _cut_unfinished_line(journal: Path, lock: Path) -> None:
    """Remove a last line without its end, left by a kill or a full disk: the next line would be appended to it."""
    if not journal.exists():
        return
    if not journal.is_file():
        raise ValueError("it is no file")
    with locked(lock), journal.open("rb+") as handle:
        written = handle.read()
        handle.truncate(written.rfind(b"\n") + 1)
