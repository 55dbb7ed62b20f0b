"""`python -m qwlit SUBCOMMAND [overrides]`: run the subcommand; turn an error into one line and an exit code."""

import importlib
import io
import sys

from qwlit.core.allocator import expand_segments
from qwlit.core.disk import explaining_disk_errors
from qwlit.core.errors import (
    ConfigError,
    DataError,
    GuardStop,
    Interrupted,
    Preempted,
    Pruned,
    QwlitError,
    SignalExit,
    nearest,
)
from qwlit.core.imports import without_collection
from qwlit.core.ranks import (
    check_rank_numbers,
    die_with_launcher,
    end_process,
    forget_rank_variables,
    is_rank_zero,
    rank_label,
    started_by_rank_zero,
)
from qwlit.core.signals import ignore_signals, record_signals
from qwlit.core.slurm import has_scontrol, is_ending_job, job_id, leave_requeue_to_script, requeue_job
from qwlit.core.streams import discard, escape_control_characters, finish_stdout, open_closed_streams, say
from qwlit.core.threads import bound_spinning

SUBCOMMANDS = {
    "train": "train a model, or resume an unfinished run",
    "plan": "show what train would do: memory, steps, time, and errors in the settings",
    "sweep": "search for settings: W&B's agents, or Optuna on this machine",
    "submit": "write and submit the Slurm job of a run, its seeds or a sweep; a requeued job resumes",
    "inspect": "show the data as the model sees it: tokens, what is in the loss, packing, quarantined rows",
    "verify": "train the same steps several times in fresh processes, and compare them bit by bit",
    "diff": "the first step and module in which two runs differ, and what may explain it",
    "evaluate": "loss, accuracy and quality of the answers of trained models, on any rows",
    "generate": "talk to a trained model, or answer the prompts of a file",
    "export": "write a trained model as a folder for other tools, adapters merged, and prove that it is the same model",
    "report": "compare runs: settings, losses, speed, stability; which settings mattered; a page with curves",
}

OTHER_NAMES = {"chat": "generate", "eval": "evaluate", "merge": "export"}
PREEMPTIBLE_SUBCOMMANDS = ("train", "sweep")
ENDS_OF_ALL_RANKS = (GuardStop, Interrupted, Preempted, Pruned)
"""Errors that all ranks raise at the same step."""

HELP = """\
qwlit: fine-tune Qwen2 and Qwen3 models.

  python -m qwlit SUBCOMMAND [key=value ...]

Subcommands
{subcommands}

First steps
  python -m qwlit train experiment=demo        a tiny Qwen3 learns a rule in two languages: no network, no GPU
  python -m qwlit train model.path=FOLDER data.path=FILE.jsonl recipe=lora
  python -m qwlit plan hardware=a100x4 recipe=full_sft   memory, time, and errors in the settings
  python -m qwlit inspect data.path=FILE.jsonl  which tokens are in the loss, which rows are quarantined
  python -m qwlit sweep sweep=lora backend=optuna trials=20 data.path=FILE.jsonl data.val_fraction=0.05
  python -m qwlit report runs=[runs/a,runs/b]  how the settings and the results of the runs differ
  python -m qwlit train --help                 every setting, with its default and unit

Exit codes
  0 done   2 a setting or the data is wrong   3 stopped by the guard   75 preempted: run it again to resume
  4 it ran, and the answer is no   130 interrupted, saved   1 an error in qwlit
"""


def main() -> int:
    """Run the subcommand in `sys.argv` and keep `sys.argv` as it is: Lightning starts its child processes from it."""
    bound_spinning()
    expand_segments()
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end a run.
        sys.stdout.reconfigure(errors="replace")
    escape_control_characters()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(subcommands="\n".join(f"  {name:<10} {what}" for name, what in SUBCOMMANDS.items())), end="")
        return 0
    subcommand = arguments[0]
    if subcommand == "--version":
        from qwlit import __version__

        print(f"qwlit {__version__}")
        return 0
    return end_process(_exit_code(subcommand, arguments[1:]))


def _exit_code(subcommand: str, arguments: list[str]) -> int:
    """Run the subcommand; turn an error into one line. Return the exit code."""
    try:
        _run(subcommand, arguments)
        if subcommand not in PREEMPTIBLE_SUBCOMMANDS:
            # A training has its result without standard output.
            finish_stdout()
        return 0
    except QwlitError as error:
        return _report(subcommand, error)
    except SignalExit as end:
        return _report(subcommand, end.error)
    except BrokenPipeError:
        # The reader of standard output has read enough (`| head`).
        discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        if is_rank_zero():
            remedy = "; run the same command to resume" if subcommand in PREEMPTIBLE_SUBCOMMANDS else ""
            say(f"qwlit {subcommand}: interrupted{remedy}")
        return 130


def _report(subcommand: str, error: QwlitError) -> int:
    """Print the error as one line and return the exit code; requeue a preempted Slurm job."""
    if not is_rank_zero() and isinstance(error, ENDS_OF_ALL_RANKS):
        # Rank 0 reports for all ranks. At the first exit code that is not 0 a launcher kills the other ranks, and
        # rank 0 may still be writing into the run folder.
        return 0
    process = "" if is_rank_zero() else f", {rank_label()}"
    say(f"qwlit {subcommand}{process}: {error}")
    if isinstance(error, Preempted) and job_id() is not None:
        _requeue(subcommand, error)
    return error.exit_code


def _requeue(subcommand: str, error: Preempted) -> None:
    """Ask Slurm to start the job again, unless somebody cancelled it. Call this last: Slurm then ends the job."""
    request_requeue = requeue_job if has_scontrol() else leave_requeue_to_script
    # Without scontrol the batch script finds out by itself whether Slurm is ending the job.
    if error.requeue or (error.requeue is None and has_scontrol() and is_ending_job()):
        refusal = request_requeue()
        message = f"not requeued: {refusal}" if refusal else "the job is requeued"
        say(f"qwlit {subcommand}: {message}")


def _run(subcommand: str, arguments: list[str]) -> None:
    subcommand = OTHER_NAMES.get(subcommand, subcommand)
    if subcommand not in SUBCOMMANDS:
        from qwlit.config.compose import check_arguments
        from qwlit.config.other_trainers_options import command_answer

        if answer := command_answer([subcommand, *arguments]):
            raise ConfigError(answer)
        if subcommand.startswith("-") or "=" in subcommand or "." in subcommand:
            check_arguments([subcommand, *arguments])
            raise ConfigError(f"a subcommand is missing; type qwlit train {subcommand} …, see python -m qwlit --help")
        raise ConfigError(
            f"no such subcommand.{nearest(subcommand, SUBCOMMANDS)} Subcommands: {', '.join(SUBCOMMANDS)};"
            " see python -m qwlit --help"
        )
    if "-h" in arguments or "--help" in arguments:
        from qwlit.commands.help import help_text

        print(help_text(subcommand), end="")
        return
    if subcommand == "train":
        check_rank_numbers()
        # Before the imports, which take seconds.
        die_with_launcher()
        if started_by_rank_zero():
            ignore_signals()
    else:
        forget_rank_variables()
    if sys.flags.optimize > 1:
        # transformers builds its classes from docstrings.
        raise ConfigError("transformers needs Python with docstrings; unset PYTHONOPTIMIZE, or leave out -OO")
    from qwlit.config.overrides import full_width_remark

    if subcommand in PREEMPTIBLE_SUBCOMMANDS:
        record_signals()
    try:
        with explaining_disk_errors():
            with without_collection():
                module = importlib.import_module(f"qwlit.commands.{subcommand}")
            module.main(arguments)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{error}{full_width_remark(arguments, str(error))}") from error


if __name__ == "__main__":
    sys.exit(main())
