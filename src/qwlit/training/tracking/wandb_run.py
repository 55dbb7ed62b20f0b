"""The run on W&B.

metrics.jsonl is the truth, and its row N is step N of W&B's own count: what W&B lost in an abrupt end is sent again,
and what it has from beyond the checkpoint that a run goes on from is not.
"""

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.errors import ConfigError, Interrupted, Preempted, Pruned, SignalExit, one_line
from qwlit.core.files import read_json, read_json_lines
from qwlit.core.ranks import under_agent
from qwlit.training.telemetry import Record
from qwlit.training.tracking.config import WANDB_CONFIG_KEY, LoggerConfig
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.wandb_access import Access, find_access, project_of, stop_client
from qwlit.training.tracking.wandb_uploads import Uploads

INIT_SECONDS = 30
FINISH_SECONDS = 30
"""A run that is over does not hold its GPUs longer than this for a server that does not answer, and a requeue comes
after it."""
CTRL_C = 255
"""The exit code that W&B shows as killed by the user."""


class WandbRun:
    """One run on W&B, over all processes that work on it. wandb.json says which, and whether it has got everything."""

    RECORD = "wandb.json"

    def __init__(self, logger: LoggerConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        self._logger = logger
        self._folder = folder
        self._settings = settings
        self._access = Access("disabled")
        self._run: Any = None
        self._uploads: Uploads | None = None
        self._ahead = 0
        """Rows that W&B has already, from beyond where this process goes on."""
        self._lost = False
        self._ending = threading.Lock()

    @property
    def record(self) -> dict[str, Any]:
        """The content of wandb.json; empty where there is none."""
        return read_json(self._folder.path / self.RECORD)

    def open(self, *, continues: bool) -> None:
        """Begin or go on, and say where.

        Args:
            continues: the run goes on from a checkpoint.

        Raises:
            ConfigError: W&B cannot be reached.
        """
        access = find_access()
        if access.mode == "disabled":
            console().print(f"  wandb     off ({escape(access.reason)})")
            return
        try:
            self._connect(access, continues=continues)
        except Exception as error:
            raise ConfigError(
                f"logger=wandb: {one_line(str(error))}; set WANDB_MODE=offline or logger=none to train without W&B"
            ) from None
        offline = f"offline ({access.reason}); `wandb sync {self._run.sync_dir}` sends it"
        console().print(f"  wandb     {escape(self._run.url if access.mode == 'online' else offline)}")

    def _connect(self, access: Access, *, continues: bool) -> None:
        """Open the run and send the rows of metrics.jsonl that W&B lacks."""
        run = self._run = self._init(access, self.record.get("id") if continues else None)
        run.define_metric("*", step_metric="step")
        self._access, self._lost = access, False
        self._write_record(complete=False)
        rows = read_json_lines(self._folder.path / "metrics.jsonl")
        self._ahead = max(0, run.starting_step - len(rows))
        for row in rows[run.starting_step :]:
            self._send(row)
        if self._logger.upload_checkpoints:
            self._uploads = Uploads(run, self._folder)

    def _write_record(self, *, complete: bool) -> None:
        run, mode = self._run, self._access.mode
        place = {"id": run.id, "project": run.project, "entity": run.entity or self._logger.entity}
        url = run.url if mode == "online" else None
        self._folder.write_json(self.RECORD, {**place, "mode": mode, "url": url, "complete": complete})

    def _init(self, access: Access, id: str | None) -> Any:
        import wandb

        logger, folder = self._logger, self._folder.path
        online = access.mode == "online"
        place: dict[str, Any] = {"project": project_of(logger), "entity": logger.entity, "id": id}
        if not online:
            # Without a server to ask, the newest part holds all rows: a run by itself for `wandb sync`.
            for part in (folder / "wandb").glob(f"offline-run-*-{id}"):
                shutil.rmtree(part)
        return wandb.init(
            # Under an agent all this is in the environment.
            **({} if under_agent() else place),
            dir=folder,
            mode=access.mode,
            name=folder.name,
            group=logger.group,
            tags=logger.tags,
            config={WANDB_CONFIG_KEY: self._settings},
            resume="allow" if online else None,
            # Not the process's global run, so that another can take its place in `finish`.
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                # The screen is the user's; its lines say nothing that the rows do not.
                console="off",
                stop_fn=_stop_trial if under_agent() else None,
            ),
        )

    def log(self, step: int, row: Record) -> None:
        """Take in a row of metrics.jsonl; hands it over in about 0.1 ms and does not wait."""
        if self._ahead:
            self._ahead -= 1
        else:
            self._send({"step": step, **row})

    def _send(self, row: dict[str, Any]) -> None:
        if self._run is None or self._lost:
            return
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception:
            # Its helper process is gone: no reason to end a training. `finish` sends what is missing.
            self._lost = True

    def upload(self, checkpoint: Path) -> None:
        """Take in a saved checkpoint, which may be deleted afterwards."""
        if self._uploads is not None:
            self._uploads.add(checkpoint)

    def finish(self, code: int, error: BaseException | None = None) -> None:
        """Hand over the figures of summary.json and all that is not sent yet, and close the run.

        Args:
            code: what the process ends with.
            error: what ended the run before its end.
        """
        if isinstance(error, Interrupted | KeyboardInterrupt):
            code = CTRL_C
        if isinstance(error, Preempted | Pruned):
            # It is leaving. The agent and W&B's server may both have asked.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with self._ending:
            if self._run is None:
                return
            try:
                try:
                    self._write_record(complete=self._close(code, error))
                except TimeoutError:
                    raise
                except Exception:
                    # Its helper process was killed, by a signal that went to all processes of a job, say. Another one
                    # asks the server what it has, and sends the rest.
                    stop_client()
                    self._connect(find_access(), continues=True)
                    self._write_record(complete=self._close(code, error))
            except (Exception, KeyboardInterrupt, SignalExit) as failure:
                reason = one_line(str(failure)) or type(failure).__name__
                message = f"W&B has not got everything ({reason}); the same command sends the rest"
                step = int(self._folder.read_summary().get("steps") or 0)
                self._folder.append_event(step, "finding", message=message)
                console().print(f"  [yellow]note[/]      {escape(message)}")
            finally:
                stop_client()
                self._run = None

    def _close(self, code: int, error: BaseException | None) -> bool:
        """Return whether all checkpoints are uploaded as well."""
        if self._lost:
            raise ConnectionError
        # A machine that is asked for back does not wait for long; who goes on with the run sends the rest.
        uploaded = self._uploads is None or self._uploads.finish(wait=not isinstance(error, Preempted | Pruned))
        figures = self._folder.read_summary()
        self._run.summary.update({name: value for name, value in figures.items() if value is not None})
        if isinstance(error, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=code)
        return uploaded


def _stop_trial() -> None:
    """Called from a thread of W&B's when the sweep or its user stops the run; by itself it would send Ctrl-C."""
    os.kill(os.getpid(), signal.SIGTERM)
