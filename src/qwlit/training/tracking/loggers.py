"""Loggers beside W&B, by name: each passes the records of metrics.jsonl to a Lightning logger.

metrics.jsonl has all records. A logger that opens gets those that it lacks: none is lost when a run resumes after an
abrupt end, and none is there twice.
"""

import logging
import os
import shlex
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.extras import import_extra
from qwlit.core.files import read_json, read_json_lines
from qwlit.core.ranks import is_rank_zero
from qwlit.training.config import LoggerConfig
from qwlit.training.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from qwlit.training.telemetry import Record

Ending = Literal["done", "stopped", "failed"]
"""stopped: by a signal; the run can be resumed."""
MLFLOW_STATUS: dict[Ending, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
SWANLAB_STATE: dict[Ending, str] = {"done": "success", "stopped": "aborted", "failed": "crashed"}
Point = tuple[str, int]
"""A metric's name and its step."""


class NamedLogger(ABC):
    """One logger of a run, on rank 0. If it fails while the run trains, the run continues without it and says so."""

    name: str
    modules: tuple[str, ...] = ()
    """The logger needs one of these modules; the package `package` has it."""
    package = ""

    def __init__(self, config: LoggerConfig, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self._logger: Logger | None = None
        self._known: set[Point] = set()
        """What the logger already has, from before the resume."""

    @abstractmethod
    def connect(self, settings: dict[str, Any]) -> tuple["Logger", str]:
        """Open the Lightning logger and pass it all settings, if it does not have them yet.

        Returns:
            The logger, and where a person finds the records.
        """

    def disconnect(self, logger: "Logger", ending: Ending) -> None:
        # Not "success", with which Lightning's TensorBoardLogger also writes an empty hparams.yaml.
        logger.finalize("finished")

    @property
    def directory(self) -> Path:
        """The logger's own folder in the run folder."""
        return self._folder.path / self.name

    def open(self, settings: dict[str, Any]) -> None:
        """Open the logger, and pass it the records of metrics.jsonl that it lacks.

        Raises:
            ConfigError: it cannot be opened.
        """
        # Their servers' addresses and tables are of no interest, and qwlit prints where the records are.
        for library in ("mlflow", "alembic", "lightning.pytorch.loggers"):
            logging.getLogger(library).setLevel(logging.ERROR)
        try:
            logger, where = self.connect(settings)
            for record in read_json_lines(self._folder.path / "metrics.jsonl"):
                self._send(logger, record.pop("step"), record)
        except Exception as error:
            reason = one_line(str(error)) or type(error).__name__
            raise ConfigError(f"logger={self.name}: {reason}; set logger=none to train without it") from None
        self._logger = logger
        console().print(f"  {self.name:<9} {escape(where)}")

    def log(self, step: int, record: "Record") -> None:
        if self._logger is None:
            return
        try:
            self._send(self._logger, step, record)
        except Exception as error:
            self._logger = None
            self._note(step, error)

    def close(self, ending: Ending) -> None:
        """Write what is not written yet, and close the logger."""
        logger, self._logger = self._logger, None
        if logger is None:
            return
        try:
            self.disconnect(logger, ending)
        except Exception as error:
            self._note(int(self._folder.read_summary().get("steps") or 0), error)

    def _send(self, logger: "Logger", step: int, record: "Record") -> None:
        new = {name: value for name, value in record.items() if value is not None and (name, step) not in self._known}
        if new:
            logger.log_metrics(new, step)

    def _note(self, step: int, error: Exception) -> None:
        reason = one_line(str(error)) or type(error).__name__
        message = f"logger={self.name} failed ({reason}); metrics.jsonl has every record"
        self._folder.append_event(step, "finding", message=message)
        console().print(f"  [yellow]note[/]      {escape(message)}")


class TensorBoard(NamedLogger):
    """Event files in tensorboard/, written anew by each launch.

    metrics.jsonl has no times, so after a resume TensorBoard's WALL axis shows all earlier steps at its start.
    """

    name, modules, package = "tensorboard", ("tensorboard", "tensorboardX"), "tensorboard"

    def connect(self, settings: dict[str, Any]) -> tuple["Logger", str]:
        from lightning.pytorch.loggers import TensorBoardLogger

        # A TensorBoard that shows the run stops at a deleted file, so empty it. TensorBoard drops what it has read from
        # it, all points from `purge_step` on, when it reads the new file.
        for earlier in self.directory.glob("events.out.tfevents.*"):
            earlier.write_bytes(b"")
        logger = TensorBoardLogger(self._folder.path, name=self.name, version="", purge_step=0)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        logger.experiment.add_text("settings", f"```\n{text}```")
        return logger, f"tensorboard --logdir {shlex.quote(str(self._folder.path.parent))}"


class Csv(NamedLogger):
    """csv/metrics.csv, written anew by each launch, and csv/hparams.yaml."""

    name = "csv"

    def connect(self, settings: dict[str, Any]) -> tuple["Logger", str]:
        from lightning.pytorch.loggers import CSVLogger

        shutil.rmtree(self.directory, ignore_errors=True)
        logger = CSVLogger(self._folder.path, name=self.name, version="", flush_logs_every_n_steps=1)
        logger.log_hyperparams(settings)
        return logger, str(self.directory / "metrics.csv")


class MLflow(NamedLogger):
    """A run on the server of MLFLOW_TRACKING_URI, else in mlflow.db; mlflow.json keeps its id."""

    name, modules, package = "mlflow", ("mlflow",), "mlflow-skinny"
    record = "mlflow.json"

    def connect(self, settings: dict[str, Any]) -> tuple["Logger", str]:
        from lightning.pytorch.loggers import MLFlowLogger

        # The default of 7 repeats a call that gets no answer for four minutes, and the run waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        given = os.environ.get("MLFLOW_TRACKING_URI")
        address = given or f"sqlite:///{self._folder.path.resolve() / 'mlflow.db'}"
        experiment = self._config.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "qwlit"
        earlier = read_json(self._folder.path / self.record).get("id")
        logger = MLFlowLogger(experiment, self._folder.path.name, tracking_uri=address, run_id=earlier)
        client, run_id = logger.experiment, logger.run_id
        if not given:
            # MLflow sets it, and a later run in this process would then log into this run's folder.
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        if earlier is None:
            logger.log_hyperparams(settings)
            self._folder.write_json(self.record, {"id": run_id})
        else:
            client.update_run(run_id, status="RUNNING")
        for name in client.get_run(run_id).data.metrics:
            self._known |= {(name, metric.step) for metric in client.get_metric_history(run_id, name)}
        # Do not print the server's address: it may hold a password.
        return logger, "on the server of MLFLOW_TRACKING_URI" if given else f"mlflow ui --backend-store-uri {address}"

    def disconnect(self, logger: "Logger", ending: Ending) -> None:
        logger.finalize(MLFLOW_STATUS[ending])


class SwanLab(NamedLogger):
    """A run on SwanLab with an API key (`swanlab login`), else in swanlab/ to be sent later; swanlab.json keeps its id.

    SwanLab does not say which records it has: after an abrupt end, it may lack those of the last seconds before the
    checkpoint, and have those after it twice.
    """

    name, modules, package = "swanlab", ("swanlab",), "swanlab"
    record = "swanlab.json"

    def connect(self, settings: dict[str, Any]) -> tuple["Logger", str]:
        import swanlab
        from swanlab.integration.pytorch_lightning import SwanLabLogger

        # Do not upload the terminal's output: the records have the same numbers.
        options = swanlab.Settings(terminal={"proxy_type": "none"})
        mode = "offline" if options.mode == "online" and not options.api_key else options.mode
        online: dict[str, Any] = {}
        if mode == "online":
            earlier = read_json(self._folder.path / self.record).get("id")
            online = {"id": earlier, "resume": "allow"}
            records = read_json_lines(self._folder.path / "metrics.jsonl") if earlier else []
            self._known = {(name, record["step"]) for record in records for name in record}
        else:
            # Without a server each launch is a run of its own, so the newest gets all records.
            shutil.rmtree(self.directory, ignore_errors=True)
        logger = SwanLabLogger(
            project=self._config.project or "qwlit",
            experiment_name=self._folder.path.name,
            log_dir=str(self.directory),
            mode=mode,
            tags=list(self._config.tags),
            settings=options,
            **online,
        )
        logger.log_hyperparams(settings)
        self._folder.write_json(self.record, {"id": logger.version, "mode": mode})
        return logger, mode if mode == "online" else f"{mode}, in {self.directory}"

    def disconnect(self, logger: "Logger", ending: Ending) -> None:
        import swanlab

        swanlab.finish(state=SWANLAB_STATE[ending])


LOGGERS: dict[str, type[NamedLogger]] = {kind.name: kind for kind in (TensorBoard, Csv, MLflow, SwanLab)}


def check_named_loggers(config: LoggerConfig) -> None:
    """Refuse a logger whose package is missing. Rank 0 opens the loggers, so other ranks check nothing.

    Raises:
        ConfigError: naming the package.
    """
    for name in config.use:
        if is_rank_zero() and (kind := LOGGERS.get(name)) and kind.modules:
            import_extra(*kind.modules, package=kind.package, setting=f"logger={name}")
