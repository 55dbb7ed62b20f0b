"""Train: from the settings to the summary. `train` and `TrainingRun.execute` read from top to bottom."""

import signal
from dataclasses import asdict, replace
from functools import cached_property

from rich.markup import escape

from qwlit.config.compose import Composed, as_tree
from qwlit.config.remedies import TriedRun
from qwlit.config.run import flatten
from qwlit.core.console import console
from qwlit.core.disk import explaining_disk_errors
from qwlit.core.files import resolve_path
from qwlit.core.ranks import die_with_parent, is_rank_zero, under_agent
from qwlit.core.signals import answering_signals
from qwlit.core.slurm import torchrun_warning
from qwlit.model.load import fingerprint
from qwlit.planning.run_plan import PlannedData, RunPlan, build_plan
from qwlit.planning.setup import machine_of
from qwlit.run.begin import begin, recording_status, refuse_changes
from qwlit.run.callbacks import Extensions
from qwlit.run.finish import finish, print_summary
from qwlit.run.fit import fit
from qwlit.run.go_back import rollbacks_before
from qwlit.run.modules import load_model
from qwlit.run.named_loggers import named_loggers
from qwlit.run.resume import ResumePoint, refuse_occupied_folder
from qwlit.run.wandb_logging import logged_to_wandb, send_missing_to_wandb
from qwlit.training.checkpointing.folder import newest
from qwlit.training.determinism import prepare_determinism
from qwlit.training.resilience.requeue_limit import counting_requeues
from qwlit.training.resilience.rollback import Rollback, lr_factor
from qwlit.training.tracking.run_folder import FINISHED, RunFolder
from qwlit.training.tracking.run_lock import RunLock
from qwlit.training.tracking.wandb_access import check_logger

NO_EXTENSIONS = Extensions()


def run_folder(composed: Composed) -> RunFolder:
    """Return the run's folder: run.root / run.name."""
    return RunFolder(resolve_path(composed.config.run.root) / str(composed.config.run.name))


@explaining_disk_errors()
def train(composed: Composed, extensions: Extensions = NO_EXTENSIONS) -> None:
    """Train from the start, or resume an unfinished run of this name.

    Raises:
        QwlitError: see its subclasses in `core.errors`; each has the exit code that scripts rely on.
    """
    if under_agent() and is_rank_zero():
        # A trial whose agent was killed must end: the next agent uses the same GPU.
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        die_with_parent(signum=signal.SIGUSR2 if ignored else signal.SIGINT)
    if under_agent() and "guard.max_rollbacks" not in composed.typed:
        composed = without_rollbacks(composed)
    # Before CUDA starts: CUDA reads the environment only once.
    prepare_determinism(composed.config.determinism, tf32=composed.config.hardware.tf32)
    folder = run_folder(composed)
    # Read this before rank 0 locks the folder and writes its own job into the summary.
    is_requeued = folder.belongs_to_this_job
    if is_requeued:
        composed = resume_requeued(composed)
    is_done = is_requeued and folder.status == FINISHED
    if is_done and not is_rank_zero():
        return
    # Before the lock: a rank that nobody else belongs to would wait there.
    machine = machine_of(composed)
    counting = counting_requeues(
        folder, lambda: ResumePoint(newest(folder)).step, composed.config.slurm.max_requeues_in_place
    )
    # A signal raises Preempted out of the lock, and only then `counting` may refuse another requeue.
    with counting, answering_signals(), RunLock(folder, composed.config.hardware.timeout_seconds) as lock:
        # Before the plan, which tokenizes the data and loads the model: a refusal must not come after hours of work.
        if is_rank_zero() and _nothing_to_do(folder, composed, is_done=is_done):
            return
        # The other ranks waited for the lock, so they read the data that rank 0 has prepared.
        TrainingRun(build_plan(composed, console(), machine=machine), folder, extensions).execute(lock)


def resume_requeued(composed: Composed) -> Composed:
    """Return the settings of a requeued job: it resumes, so ignore `run.overwrite` and `resume`."""
    run = replace(composed.config.run, overwrite=False)
    return replace(composed, config=replace(composed.config, run=run, resume="auto"))


def without_rollbacks(composed: Composed) -> Composed:
    """Return the settings of a sweep's trial: one that halves its learning rate would be a trial of another one."""
    guard = replace(composed.config.guard, max_rollbacks=0)
    return replace(composed, config=replace(composed.config, guard=guard))


def _nothing_to_do(folder: RunFolder, composed: Composed, *, is_done: bool) -> bool:
    """Return whether the run is finished, after sending W&B what it lacks of it; else check folder and logger. Rank 0.

    Raises:
        ConfigError: the folder holds something else or a finished run, or the logger cannot be used.
    """
    config = composed.config
    if is_done:
        console().print(f"{escape(str(folder.path))} is done")
    if send_missing_to_wandb(config, folder) or is_done:
        return True
    refuse_occupied_folder(folder, overwrite=config.run.overwrite)
    check_logger(config.logger)
    if warning := torchrun_warning():
        console().print(f"[yellow]note[/] {warning}")
    return False


class TrainingRun:
    """A planned run, its folder and its model."""

    def __init__(self, plan: RunPlan, folder: RunFolder, extensions: Extensions) -> None:
        self.plan, self.folder, self.extensions = plan, folder, extensions
        self.config = plan.config
        self.rollbacks: tuple[Rollback, ...] = ()
        # Under FSDP2 `fit` fills in the weights after sharding, so that no rank ever holds all of them.
        self.loss_model = load_model(plan, leave_empty=plan.machine.strategy == "fsdp")

    @property
    def data(self) -> PlannedData:
        return self.plan.planned_data

    def follow(self, rollbacks: tuple[Rollback, ...]) -> None:
        """Train with the data and the learning rates that these decisions leave."""
        self.rollbacks = rollbacks
        self.plan = replace(self.plan, data=replace(self.data, steps=self.data.steps.after(rollbacks)))

    @property
    def tried(self) -> TriedRun:
        """What remedies for this run are computed from."""
        settings, machine = flatten(as_tree(self.config)), asdict(self.plan.machine)
        return TriedRun(self.folder.config_file, settings, machine, lr_factor=lr_factor(self.rollbacks))

    @cached_property
    def base(self) -> str | None:
        """The fingerprint of the pretrained weights; None if the weights are random."""
        return fingerprint(self.config.model)

    def execute(self, lock: RunLock) -> None:
        """Start or resume, fit, export and print the summary."""
        if is_rank_zero():
            # A refusal must leave the folder as it is.
            refuse_changes(self)
        # `recording_status` is the inner block: it writes the status, then W&B gets the summary with the status.
        with (
            logged_to_wandb(self.config, self.folder) as wandb_run,
            named_loggers(self.config, self.folder) as loggers,
            recording_status(self.folder),
        ):
            start = begin(self)
            self.follow(rollbacks_before(start, self.folder))
            self.folder.drop_set_aside(len(self.rollbacks))
            # Rank 0 has written all files that the other ranks read; processes that Lightning starts need not wait.
            lock.announce_ready()
            if wandb_run:
                wandb_run.open(continues=start.checkpoint is not None)
            for logger in loggers:
                logger.open(as_tree(self.config))
            training = fit(self, start, wandb_run, [logger.log for logger in loggers])
            records = finish(self, training) if is_rank_zero() else []
        # Print last, when the run is recorded as done: printing fails where the terminal has gone.
        print_summary(training, records, self.folder)
