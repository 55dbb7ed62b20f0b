"""`python -m qwlit VERB [overrides]`: find the verb, run it, turn errors into one line and an exit code."""

import importlib
import io
import os
import signal
import sys

from qwlit.core.errors import ConfigError, GuardStop, Interrupted, Preempted, Pruned, QwlitError, SignalExit, nearest
from qwlit.core.ranks import end_process, is_rank_zero, rank_label
from qwlit.core.signals import record_signal
from qwlit.core.slurm import has_scontrol, is_ending_job, job_id, leave_requeue_to_script, requeue_job

SUBCOMMANDS = {
    "train": "train a model, or go on with an unfinished run",
    "plan": "say what train would do: memory, steps, time, and what is wrong with the settings",
    "sweep": "search for settings: W&B's agents, or Optuna on this machine",
    "submit": "write and submit the Slurm job of a run, its seeds or a sweep; requeued, it goes on",
    "inspect": "show the data as the model will see it: tokens, what is learnt, packing, what was put aside",
    "report": "compare runs: settings, losses, speed, stability; which settings mattered; a page with curves",
}

PREEMPTIBLE_SUBCOMMANDS = ("train", "sweep")
ENDS_OF_ALL_RANKS = (GuardStop, Interrupted, Preempted, Pruned)

HELP = """\
qwlit: fine-tune Qwen2 and Qwen3 models.

  python -m qwlit VERB [key=value ...]

Verbs
{verbs}

First steps
  python -m qwlit train experiment=demo        a tiny Qwen3 learns a rule in two languages: no network, no GPU
  python -m qwlit train model.path=FOLDER data.path=FILE.jsonl recipe=lora
  python -m qwlit plan hardware=a100x4 recipe=full_sft   does it fit, how long will it take, what is wrong with it
  python -m qwlit inspect data.path=FILE.jsonl  what of it is learnt, and what cannot be used
  python -m qwlit sweep sweep=lora backend=optuna trials=20 data.path=FILE.jsonl data.val_fraction=0.05
  python -m qwlit report runs=[runs/a,runs/b]  what differed between runs, and what came of it
  python -m qwlit train --help                 every setting, with its default and unit

Exit codes
  0 done   2 a setting or the data is wrong   3 stopped by the guard   75 preempted, goes on when run again
  130 interrupted, saved   1 a fault of qwlit's
"""


def help_text() -> str:
    return HELP.format(verbs="\n".join(f"  {name:<10} {what}" for name, what in SUBCOMMANDS.items()))


def main() -> int:
    """Run the verb in `sys.argv`, which stays whole: Lightning's child processes are started with the same words."""
    # OpenMP's threads otherwise spin while they wait, and beside any other busy process each step waits for a core:
    # measured on two cores shared with one such process, the demo trains at 13,400 instead of 3,100 tokens a second.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A screen that cannot show a character must not end a run.
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if words[0] == "--version":
        from qwlit import __version__

        print(f"qwlit {__version__}")
        return 0
    try:
        return end_process(_run(words[0], words[1:]))
    except QwlitError as error:
        return end_process(_report(words[0], error))
    except SignalExit as end:
        return end_process(_report(words[0], end.error))
    except KeyboardInterrupt:
        if is_rank_zero():
            print(f"qwlit {words[0]}: interrupted; run the same command to go on", file=sys.stderr)
        return end_process(130)


def _report(verb: str, error: QwlitError) -> int:
    """Print the error's one line and return the exit code."""
    if not is_rank_zero() and isinstance(error, ENDS_OF_ALL_RANKS):
        # All ranks end so together, and rank 0 says it. Launchers kill the others at the first code that is not 0,
        # which could be while rank 0 still puts the run folder in order.
        return 0
    process = "" if is_rank_zero() else f", {rank_label()}"
    print(f"qwlit {verb}{process}: {error}", file=sys.stderr)
    if isinstance(error, Preempted) and job_id() is not None:
        _requeue(verb, error)
    return error.exit_code


def _requeue(verb: str, error: Preempted) -> None:
    """Have the Slurm job started again, unless somebody cancelled it.

    The very last thing that is done: Slurm ends the job for it.
    """
    ask = requeue_job if has_scontrol() else leave_requeue_to_script
    # What Slurm itself wants the script finds out as well.
    if error.requeue or (error.requeue is None and has_scontrol() and is_ending_job()):
        refusal = ask()
        print(f"qwlit {verb}: " + (f"not requeued: {refusal}" if refusal else "the job is requeued"), file=sys.stderr)


def _run(verb: str, arguments: list[str]) -> int:
    if verb not in SUBCOMMANDS:
        raise ConfigError(
            f"no such verb.{nearest(verb, SUBCOMMANDS)} Verbs: {', '.join(SUBCOMMANDS)}; see python -m qwlit --help"
        )
    if verb in PREEMPTIBLE_SUBCOMMANDS:
        # They may come while the verb is still being imported, and when all is saved and only the end is to be told.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, record_signal)
    module = importlib.import_module(f"qwlit.commands.{verb}")
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
