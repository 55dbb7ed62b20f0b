"""`train`: trains a model, or goes on with an unfinished run."""

import signal
from dataclasses import replace

from qwlit.commands.help import train_help
from qwlit.config.compose import Composed, compose, dump
from qwlit.core.errors import ConfigError, nearest
from qwlit.core.files import resolve_path
from qwlit.core.ranks import die_with_parent, is_rank_zero, under_agent


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(train_help(), end="")
        return 0
    overrides, show_config = _split_options(arguments)
    composed = compose(overrides)
    if show_config:
        print(dump(composed.config), end="")
    else:
        train(composed)
    return 0


def _split_options(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--cfg job` out of the words; everything else is an override."""
    words = list(arguments)
    show_config = "--cfg" in words
    if show_config:
        at = words.index("--cfg")
        if words[at + 1 : at + 2] != ["job"]:
            raise ConfigError("--cfg takes one word: --cfg job prints the composed settings")
        del words[at : at + 2]
    for word in words:
        if word.startswith("-"):
            raise ConfigError(f"{word}: no such option.{nearest(word, ['--help', '--cfg'])} Settings are key=value")
    return words, show_config


def going_on(composed: Composed) -> Composed:
    """Let the run be gone on with, whatever was typed: it is for the first of a requeued job's lives."""
    run = replace(composed.config.run, overwrite=False)
    return replace(composed, config=replace(composed.config, run=run, resume="auto"))


def train(composed: Composed) -> None:
    """Run the training that `composed` describes, from its start or from where it stopped."""
    from rich.markup import escape

    from qwlit.core.console import console
    from qwlit.core.slurm import torchrun_warning
    from qwlit.planning.assemble import assemble, load_model
    from qwlit.run.begin import begin, recorded
    from qwlit.run.finish import finish, show
    from qwlit.run.fit import fit
    from qwlit.run.logged import logged_to_wandb, send_rest
    from qwlit.run.resume import Start, newest, refuse_taken
    from qwlit.training.determinism import prepare_determinism
    from qwlit.training.resilience.preemption import answering_signals
    from qwlit.training.resilience.requeue_limit import counting_requeues
    from qwlit.training.tracking.run_folder import FINISHED, RunFolder, RunLock
    from qwlit.training.tracking.wandb_access import check_logger

    config = composed.config
    if under_agent() and is_rank_zero():
        # Left alone it would train for nobody, on a GPU that the next agent counts on.
        die_with_parent(number=signal.SIGINT)
    prepare_determinism(config.determinism)
    folder = RunFolder(resolve_path(config.run.root) / str(config.run.name))
    is_own = folder.is_this_jobs
    if is_own:
        composed = going_on(composed)
        config = composed.config
    is_over = is_own and folder.status == FINISHED
    if is_over and not is_rank_zero():
        return
    counting = counting_requeues(folder, lambda: Start(newest(folder)).step, config.slurm.max_requeues_in_place)
    with counting, answering_signals(), RunLock(folder) as lock:
        if is_rank_zero():
            if is_over:
                console().print(f"{escape(str(folder.path))} is done")
            if send_rest(config, folder) or is_over:
                return
            refuse_taken(folder, overwrite=config.run.overwrite)
            check_logger(config.logger)
            if warning := torchrun_warning():
                console().print(f"[yellow]note[/] {warning}")
        job = assemble(composed)
        loss_model = load_model(job, leave_empty=job.machine.strategy == "fsdp")
        start = begin(job, loss_model, folder)
        lock.announce()
        # Around `recorded`: W&B gets the summary that says how the run ended.
        with logged_to_wandb(config, folder) as wandb_run, recorded(folder):
            if wandb_run:
                wandb_run.open(continues=start.checkpoint is not None)
            loop = fit(job, loss_model, folder, start, wandb_run)
            records = finish(job, loss_model, loop, folder) if is_rank_zero() else []
        # Only now: the screen may be gone, and the run is not less done for it.
        show(loop, records, folder)
