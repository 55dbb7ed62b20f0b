"""Upload checkpoints to W&B during the training, as versions of one artifact."""

import contextlib
import os
import shutil
import threading
from pathlib import Path
from queue import Queue
from typing import Any

from rich.markup import escape

from qwlit.core.console import console
from qwlit.core.errors import ConfigError, SignalExit, one_line
from qwlit.core.files import read_json_lines
from qwlit.training.checkpointing.folder import linked_checkpoint, list_checkpoints
from qwlit.training.checkpointing.manifest import find_damage, step_of
from qwlit.training.tracking.run_folder import RunFolder

UPLOADED = "uploaded"


class Uploads:
    """Uploads one checkpoint after another in a thread, first those that an earlier launch did not upload."""

    def __init__(self, run: Any, folder: RunFolder) -> None:
        self._run = run
        self._folder = folder
        self._held = folder.path / "wandb" / "uploads"
        self._waiting: Queue[tuple[Path, list[str]]] = Queue()
        self._leaving = False
        self._num_added = 0
        shutil.rmtree(self._held, ignore_errors=True)
        events = read_json_lines(folder.path / "events.jsonl")
        sent = {event["step"] for event in events if event.get("event") == UPLOADED}
        for checkpoint in list_checkpoints(folder):
            if step_of(checkpoint) not in sent:
                self.add(checkpoint)
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, checkpoint: Path) -> None:
        """Queue a checkpoint. Hard links keep its files, so that the run may delete it before the upload."""
        # After a rollback the same step is saved again, while its first checkpoint may still be uploaded.
        self._num_added += 1
        held = self._held / str(self._num_added) / checkpoint.name
        try:
            held.mkdir(parents=True)
            for file in checkpoint.iterdir():
                _link(file, held / file.name)
        except OSError as error:
            # The caller goes on, and deletes older checkpoints, which frees disk space.
            self._say_failed(held, error)
            shutil.rmtree(held.parent, ignore_errors=True)
            return
        pointers = [name for name in ("best", "last") if linked_checkpoint(self._folder, name) == checkpoint]
        self._waiting.put((held, [f"step-{step_of(checkpoint)}", *pointers]))

    def _work(self) -> None:
        while True:
            held, aliases = self._waiting.get()
            try:
                if not self._leaving:
                    self._send(held, aliases)
            except Exception as error:
                self._say_failed(held, error)
            finally:
                self._waiting.task_done()

    def _say_failed(self, held: Path, error: Exception) -> None:
        message = f"{held.name} was not uploaded to W&B ({one_line(str(error))})"
        self._folder.append_event(step_of(held), "finding", message=message)
        console().print(f"  [yellow]note[/]      {escape(message)}")

    def _send(self, held: Path, aliases: list[str]) -> None:
        if damage := find_damage(held):
            raise ConfigError(f"it is damaged: {damage}")
        import wandb

        artifact = wandb.Artifact(f"checkpoints-{self._run.id}", type="model", metadata={"step": step_of(held)})
        for file in sorted(held.iterdir()):
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=aliases).wait()
        self._folder.append_event(step_of(held), UPLOADED, artifact=artifact.name)
        shutil.rmtree(held.parent)

    def finish(self, *, wait: bool) -> bool:
        """Wait for all uploads, or with `wait=False` drop those that are queued; return whether all are done."""
        self._leaving = not wait
        if wait:
            # A signal ends the waiting: the process must exit.
            with contextlib.suppress(KeyboardInterrupt, SignalExit):
                self._waiting.join()
        self._leaving = True
        return self._waiting.unfinished_tasks == 0


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # a file system without hard links
        shutil.copy2(file, link)
