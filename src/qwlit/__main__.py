"""`python -m qwlit SUBCOMMAND [overrides]`: find the subcommand, run it, turn errors into one line and an exit code."""

import importlib
import io
import os
import signal
import sys

from qwlit.core.errors import ConfigError, GuardStop, Interrupted, Leave, Preempted, Pruned, QwlitError, nearest
from qwlit.core.ranks import is_rank_zero, leave, rank_label
from qwlit.core.signals import note
from qwlit.core.slurm import can_ask, have_script_ask, job_id, requeue_job, wants_place_back

SUBCOMMANDS = {
    "train": "train a model, or resume an unfinished run",
    "plan": "say what train would do: memory, steps, time, and what is wrong with the settings",
    "sweep": "search for settings with W&B's agents, or with Optuna on this machine",
    "submit": "write and submit the Slurm job of a run, its seeds or a sweep; a requeued job resumes",
    "inspect": "show the data as the model will see it: tokens, loss mask, packing, quarantined rows",
    "report": "compare runs: settings, losses, speed, stability; which settings mattered; a page with curves",
}

PREEMPTED_SUBCOMMANDS = ("train", "sweep")
AGREED_ENDS = (GuardStop, Interrupted, Preempted, Pruned)

HELP = """\
qwlit: fine-tune Qwen2 and Qwen3 models.

  python -m qwlit SUBCOMMAND [key=value ...]

Subcommands
{subcommands}

First steps
  python -m qwlit train experiment=demo        a tiny Qwen3 learns a rule in two languages: no network, no GPU
  python -m qwlit train model.path=FOLDER data.path=FILE.jsonl recipe=lora
  python -m qwlit plan hardware=a100x4 recipe=full_sft   does it fit, how long will it take, what is wrong with it
  python -m qwlit inspect data.path=FILE.jsonl  which tokens are supervised, and which rows cannot be used
  python -m qwlit sweep sweep=lora backend=optuna trials=20 data.path=FILE.jsonl data.val_fraction=0.05
  python -m qwlit report runs=[runs/a,runs/b]  how runs differ in settings and results
  python -m qwlit train --help                 every setting, with its default and unit

Exit codes
  0 done   2 a setting or the data is wrong   3 stopped by the guard   75 preempted, resumes when started again
  130 interrupted, saved   1 a bug in qwlit
"""


def help_text() -> str:
    return HELP.format(subcommands="\n".join(f"  {name:<10} {what}" for name, what in SUBCOMMANDS.items()))


def main() -> int:
    """Run the subcommand that `sys.argv` names. Lightning starts its child processes with the same, unchanged argv."""
    # By default OpenMP's waiting threads spin and take cores from the working ones when another process is busy.
    # Measured on two cores beside one busy process: 13,400 tokens a second with PASSIVE, 3,100 without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end the run.
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    subcommand = arguments[0]
    if subcommand == "--version":
        from qwlit import __version__

        print(f"qwlit {__version__}")
        return 0
    try:
        return leave(_run(subcommand, arguments[1:]))
    except QwlitError as error:
        return leave(_report(subcommand, error))
    except Leave as end:
        return leave(_report(subcommand, end.error))
    except KeyboardInterrupt:
        if is_rank_zero():
            print(f"qwlit {subcommand}: interrupted; run the same command to resume", file=sys.stderr)
        return leave(130)


def _report(subcommand: str, error: QwlitError) -> int:
    """Print the error's one line and return the exit code."""
    if not is_rank_zero() and isinstance(error, AGREED_ENDS):
        # All ranks end in this way together, and rank 0 reports it. Launchers kill the other ranks at the first exit
        # code that is not 0, and rank 0 may still be writing the run folder.
        return 0
    process = "" if is_rank_zero() else f", {rank_label()}"
    print(f"qwlit {subcommand}{process}: {error}", file=sys.stderr)
    if isinstance(error, Preempted) and job_id() is not None:
        _requeue(subcommand, error)
    return error.exit_code


def _requeue(subcommand: str, error: Preempted) -> None:
    """Ask Slurm to start the job again, unless a user cancelled it.

    Call this last: Slurm ends the job as soon as it is requeued.
    """
    ask = requeue_job if can_ask() else have_script_ask
    # Without scontrol here, the batch script finds out by itself whether Slurm preempted the job.
    if error.requeue or (error.requeue is None and can_ask() and wants_place_back()):
        refusal = ask()
        print(
            f"qwlit {subcommand}: " + (f"not requeued: {refusal}" if refusal else "the job is requeued"),
            file=sys.stderr,
        )


def _run(subcommand: str, arguments: list[str]) -> int:
    if subcommand not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        hint = nearest(subcommand, SUBCOMMANDS)
        raise ConfigError(f"no such subcommand.{hint} Subcommands: {known}; see python -m qwlit --help")
    if subcommand in PREEMPTED_SUBCOMMANDS:
        # A signal may arrive before the subcommand is imported, or after everything is saved: note it, do not die.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, note)
    module = importlib.import_module(f"qwlit.commands.{subcommand}")
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
