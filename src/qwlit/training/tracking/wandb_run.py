"""The run on W&B.

metrics.jsonl and rolled_back.jsonl have all records, and the N-th one made is step N of W&B's own count. A resumed run
therefore knows which records W&B lost in an abrupt end (it sends them again), and which W&B already has from after the
checkpoint (it skips them).
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
from qwlit.core.files import read_json
from qwlit.core.ranks import under_agent
from qwlit.training.config import WANDB_CONFIG_KEY, LoggerConfig
from qwlit.training.telemetry import Record
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.wandb_access import Access, find_access, project_of, stop_client
from qwlit.training.tracking.wandb_uploads import Uploads

INIT_SECONDS = 30
FINISH_SECONDS = 30
"""How long a finished run waits for a server that does not answer: it still occupies its GPUs, and a requeue waits."""
LONGEST_NAME = 128
"""Characters of a run's name on W&B, whose server refuses longer ones; the settings there have the whole name."""
CTRL_C = 255
"""The exit code that W&B shows as killed by the user."""


class WandbRun:
    """One run on W&B, also over several launches. wandb.json holds its id, and whether W&B has everything."""

    RECORD = "wandb.json"

    def __init__(self, logger: LoggerConfig, folder: RunFolder, settings: dict[str, Any]) -> None:
        self._logger = logger
        self._folder = folder
        self._settings = settings
        self._access = Access("disabled")
        self._run: Any = None
        self._uploads: Uploads | None = None
        self._ahead = 0
        """How many of the next records W&B already has, from before the resume."""
        self._lost = False
        self._ending = threading.Lock()

    @property
    def record(self) -> dict[str, Any]:
        """The content of wandb.json; empty where there is none."""
        return read_json(self._folder.path / self.RECORD)

    def open(self, *, continues: bool) -> None:
        """Open a new run or the run of an earlier launch, and print its address.

        Args:
            continues: the run resumes from a checkpoint.

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
        """Open the run and send the records of metrics.jsonl that W&B lacks."""
        run = self._run = self._init(access, self.record.get("id") if continues else None)
        run.define_metric("*", step_metric="step")
        self._access, self._lost = access, False
        self._write_record(complete=False)
        records = self._folder.read_all_metrics()
        self._ahead = max(0, run.starting_step - len(records))
        for record in records[run.starting_step :]:
            self._send(record)
        if self._logger.upload_checkpoints:
            self._uploads = Uploads(run, self._folder)

    def _write_record(self, *, complete: bool) -> None:
        run, mode = self._run, self._access.mode
        identity = {"id": run.id, "project": run.project, "entity": run.entity or self._logger.entity}
        url = run.url if mode == "online" else None
        self._folder.write_json(self.RECORD, {**identity, "mode": mode, "url": url, "complete": complete})

    def _init(self, access: Access, id: str | None) -> Any:
        import wandb

        logger, folder = self._logger, self._folder.path
        online = access.mode == "online"
        identity: dict[str, Any] = {"project": project_of(logger), "entity": logger.entity, "id": id}
        if not online:
            # Offline no server knows which records it has. So the newest folder gets all records, for `wandb sync`.
            for part in (folder / "wandb").glob(f"offline-run-*-{id}"):
                shutil.rmtree(part)
        return wandb.init(
            # Under an agent, environment variables set these.
            **({} if under_agent() else identity),
            dir=folder,
            mode=access.mode,
            name=folder.name[:LONGEST_NAME],
            group=logger.group,
            tags=logger.tags,
            config={WANDB_CONFIG_KEY: self._settings},
            resume="allow" if online else None,
            # A run object of its own, because `finish` may have to open the run a second time.
            reinit="create_new",
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                # Do not upload the terminal's output: the records have the same numbers.
                console="off",
                stop_fn=_stop_trial if under_agent() else None,
            ),
        )

    def log(self, step: int, record: Record) -> None:
        """Pass a record of metrics.jsonl to W&B's helper process, in about 0.1 ms, without waiting for the server."""
        if self._ahead:
            self._ahead -= 1
        else:
            self._send({"step": step, **record})

    def _send(self, record: dict[str, Any]) -> None:
        if self._run is None or self._lost:
            return
        try:
            self._run.log({name: value for name, value in record.items() if value is not None})
        except Exception:
            # W&B's helper process has ended. The training continues, and `finish` sends the rest.
            self._lost = True

    def upload(self, checkpoint: Path) -> None:
        """Queue a saved checkpoint for upload; the caller may delete it afterwards."""
        if self._uploads is not None:
            self._uploads.add(checkpoint)

    def finish(self, code: int, error: BaseException | None = None) -> None:
        """Send the results of summary.json and everything not sent yet, and close the run.

        Args:
            code: the exit code of the process.
            error: the error that ended the run early.
        """
        if isinstance(error, Interrupted | KeyboardInterrupt):
            code = CTRL_C
        with self._ending:
            if self._run is None:
                return
            try:
                try:
                    self._write_record(complete=self._close(code, error))
                except TimeoutError:
                    raise
                except Exception:
                    # W&B's helper process was killed, for example by a signal to all processes of a job. A new one
                    # asks the server which records it has, and sends the rest.
                    stop_client()
                    self._connect(find_access(), continues=True)
                    self._write_record(complete=self._close(code, error))
            except (Exception, KeyboardInterrupt, SignalExit) as failure:
                reason = one_line(str(failure)) or type(failure).__name__
                message = f"W&B does not have everything ({reason}); run the same command to send the rest"
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
        # A preempted process has little time; the resumed run uploads the rest.
        uploaded = self._uploads is None or self._uploads.finish(wait=not isinstance(error, Preempted | Pruned))
        results = self._folder.read_summary()
        self._run.summary.update({name: value for name, value in results.items() if value is not None})
        if isinstance(error, Preempted):
            self._run.mark_preempting()
        self._run.finish(exit_code=code)
        return uploaded


def _stop_trial() -> None:
    """Called from W&B's thread when the sweep or its user stops the run. By default W&B would send a Ctrl-C instead."""
    os.kill(os.getpid(), signal.SIGTERM)
