"""The Python interface: train, plan, read runs, and train with a Lightning Trainer of your own. See docs/python.md."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlit.config.compose import Composed, check_arguments, compose
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, GuardStop, Interrupted, Preempted, QwlitError
from qwlit.core.files import read_json_lines, resolve_path
from qwlit.core.ranks import launched_world_size
from qwlit.training.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from qwlit.planning.run_plan import RunPlan
    from qwlit.training.data_module import StepDataModule
    from qwlit.training.module import CausalLMModule

ERRORS: tuple[type[QwlitError], ...] = (ConfigError, GuardStop, Preempted, Interrupted)


def train(*overrides: str, callbacks: "Sequence[Callback]" = (), loggers: "Sequence[Logger]" = ()) -> "Run":
    """Train, or resume an unfinished run of this name, as `qwlit train` with the same overrides does.

    A run on one device trains in this process. A run on several starts `qwlit train` as a subprocess and shows its
    output.

    Args:
        overrides: settings as on the command line, e.g. "experiment=demo", "run.name=x".
        callbacks: Lightning callbacks, called beside qwlit's own. Only where the run trains in this process.
        loggers: Lightning loggers; they get every record of metrics.jsonl. Only where the run trains in this process.

    Raises:
        QwlitError: ConfigError or DataError for wrong input, GuardStop if the guard stopped the run, Interrupted after
            Ctrl-C and Preempted after a signal; the same call then resumes the run.
    """
    composed = _composed(overrides)
    from qwlit.run.training_run import run_folder

    reason = _why_not_here(composed)
    if reason is None:
        _train_here(composed, callbacks, loggers)
    elif callbacks or loggers:
        raise ConfigError(f"callbacks and loggers work only where the run trains in this process, but {reason}")
    else:
        _train_in_subprocess(overrides)
    return Run(run_folder(composed).path)


def plan(*overrides: str) -> "RunPlan":
    """Return what `train` with the same overrides would do, as `qwlit plan` does: memory, steps, findings.

    Raises:
        ConfigError, DataError: a setting or a file is wrong.
    """
    from qwlit.planning.run_plan import build_plan

    return build_plan(_composed(overrides), console(stderr=True), preview=True)


def lightning_modules(*overrides: str) -> "tuple[CausalLMModule, StepDataModule]":
    """Return the LightningModule and the LightningDataModule of a run, for a Trainer of your own.

    The Trainer needs `max_steps=data.total_steps` (or `max_epochs=1`), the devices and the precision of the settings,
    and on several devices `use_distributed_sampler=False`. It writes no run folder and no export.

    Raises:
        ConfigError, DataError: a setting or a file is wrong, or the run needs qwlit's own Trainer.
    """
    from qwlit.planning.run_plan import build_plan
    from qwlit.run.modules import build_data_module, build_module, load_model
    from qwlit.training.determinism import prepare_determinism

    composed = _composed(overrides)
    prepare_determinism(composed.config.determinism, tf32=composed.config.hardware.tf32)
    run_plan = build_plan(composed, console(stderr=True))
    machine = run_plan.machine
    if machine.strategy == "fsdp" or machine.precision == "16-mixed":
        setting = "hardware.strategy=fsdp" if machine.strategy == "fsdp" else "hardware.precision=16-mixed"
        raise ConfigError(f"{setting} needs qwlit's own Trainer; use qwlit.train, or choose another value")
    return build_module(run_plan, load_model(run_plan), with_telemetry=True), build_data_module(run_plan)


class Run:
    """A run, read from its folder. Each call reads the files again, so it also follows a run that is training."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError if `path` is not the folder of a run."""
        self._folder = RunFolder(resolve_path(str(path)))
        if not self._folder.holds_run:
            raise ConfigError(f"{path} is not the folder of a run; give runs/NAME")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self._folder.status})"

    @property
    def path(self) -> Path:
        return self._folder.path

    @property
    def summary(self) -> dict[str, Any]:
        """The results: status, steps, losses, tokens per second."""
        return self._folder.read_summary()

    def metrics(self) -> Any:
        """Return the logged steps, oldest first: a DataFrame where pandas is installed, else a list of dicts."""
        records = read_json_lines(self.path / "metrics.jsonl")
        try:
            import pandas
        except ImportError:
            return records
        return pandas.DataFrame(records)

    def events(self) -> list[dict[str, Any]]:
        """Return what happened, oldest first: checkpoints, skipped steps, findings."""
        return read_json_lines(self.path / "events.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """Return the model's answers: in training (step, prompt, answer, entropy), then at the end (prompt, answer,
        expected, exact)."""
        return read_json_lines(self.path / "samples.jsonl")

    def model(self, **options: Any) -> "PreTrainedModel":
        """Load the trained model with transformers' from_pretrained, which gets `options`; an adapter gets its base."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._export(), **options)
        return model

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Load the exported tokenizer, with the chat template of the training."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(self._export())
        return tokenizer

    def _export(self) -> Path:
        export = self.path / "export"
        if not export.is_dir():
            raise ConfigError(
                f"{self.path} has no export/ yet: its status is {self._folder.status}; train it to the end"
            )
        return export


def _composed(overrides: Sequence[str]) -> Composed:
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(f"{override!r} is not a text: pass each override by itself, 'experiment=demo', 'seed=1'")
    check_arguments(list(overrides))
    return compose(list(overrides))


def _why_not_here(composed: Composed) -> str | None:
    """Return why the run cannot train in this process; None if it can."""
    if threading.current_thread() is not threading.main_thread():
        return "this is not the main thread, and Python handles signals only there"
    if launched_world_size() is not None:
        return None
    from qwlit.planning.setup import machine_of

    if (world_size := machine_of(composed).world_size) > 1:
        return f"hardware.devices x hardware.num_nodes starts {world_size} processes; set hardware.devices=1"
    return None


def _train_here(composed: Composed, callbacks: "Sequence[Callback]", loggers: "Sequence[Logger]") -> None:
    from lightning.pytorch.callbacks import Checkpoint

    from qwlit.run.callbacks import Extensions
    from qwlit.run.training_run import train as train_run
    from qwlit.training.tracking.loggers import check_named_loggers

    if saving := next((c for c in callbacks if isinstance(c, Checkpoint)), None):
        raise ConfigError(
            f"callbacks: qwlit.train saves checkpoints itself (checkpoint.every_steps); leave {type(saving).__name__}"
            " out, or use it in a Trainer of your own (qwlit.lightning_modules)"
        )
    check_named_loggers(composed.config.logger)
    train_run(composed, Extensions(callbacks, loggers))


def _train_in_subprocess(overrides: Sequence[str]) -> None:
    """Run `qwlit train` and print what it prints; raise its last line as the error that its exit code stands for."""
    command = [sys.executable, "-m", "qwlit", "train", *overrides]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stdout is not None
        last = ""
        while True:
            try:
                for line in process.stdout:
                    print(line, end="")
                    last = line
                break
            except KeyboardInterrupt:
                # The run saves at the next step boundary; its last lines follow.
                process.send_signal(signal.SIGINT)
    if process.returncode:
        error = next((kind for kind in ERRORS if kind.exit_code == process.returncode), QwlitError)
        raise error(last.strip().removeprefix("qwlit train: ") or f"qwlit train ended with code {process.returncode}")
