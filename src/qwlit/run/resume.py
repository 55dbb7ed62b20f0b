"""Decide whether the run starts at step 0, resumes, or is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwlit.config.overrides import format_value
from qwlit.core.errors import ConfigError
from qwlit.core.files import load_json, read_json, read_small_text
from qwlit.core.slurm import job_id
from qwlit.training.checkpointing.folder import find_strays, newest, remove_unfinished_checkpoints, rename_damaged
from qwlit.training.checkpointing.manifest import step_of
from qwlit.training.tracking.run_folder import FINISHED, ROLLED_BACK, RUNNING, STREAMS, RunFolder

START_AGAIN = "start again with run.name=… or run.overwrite=true"


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint at which the run resumes, or None for step 0."""

    checkpoint: Path | None
    renamed_to: Path | None = None
    """The new name of an unfinished run that this one replaces."""
    damaged: tuple[str, ...] = ()
    """What is wrong with newer checkpoints."""
    strays: tuple[str, ...] = ()
    """Names in checkpoints/ that are passed over."""

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0


def refuse_occupied_folder(folder: RunFolder, *, overwrite: bool) -> None:
    """Refuse a path that another program uses, or a finished run.

    Raises:
        ConfigError: the path holds something that is no run, a finished run without `overwrite`, or a broken link; or
            records are a link to a file elsewhere.
    """
    path = folder.path
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path} links to {path.readlink()}, which does not exist; create it, or remove the link")
    for name in (*STREAMS, ROLLED_BACK):
        # The run appends to these files, so another file would be changed.
        if (path / name).is_symlink() and not (path / name).resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"{path / name} links to {(path / name).readlink()}, outside the run; remove the link")
    if path.exists() and not folder.holds_run and not (path.is_dir() and _is_empty(folder)):
        raise ConfigError(f"{path} exists and is not a run; move it away, or set another run.name")
    if folder.status == FINISHED and not overwrite:
        raise ConfigError(f"{folder.path} is finished; set another run.name=…, or run.overwrite=true to train it again")


def _is_empty(folder: RunFolder) -> bool:
    """Whether the folder is empty, or holds only what a kill -9 before the first summary.json leaves."""
    inside = [*folder.path.iterdir(), *(folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else [])]
    inside = [path for path in inside if not path.match(".summary.json.*.tmp")]
    return inside in ([], [folder.checkpoints])


def prepare_folder(folder: RunFolder, *, resume: Literal["auto", "never"], overwrite: bool) -> ResumePoint:
    """Create the run folder, or find the newest good checkpoint of an unfinished run in it. For rank 0.

    Raises:
        ConfigError: the run has checkpoints, and all of them are damaged.
    """
    renamed = None
    if folder.holds_run:
        if overwrite:
            folder.delete()
        elif resume == "never":
            renamed = folder.rename_old_run()
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    folder.write_summary(status=RUNNING, job=job_id())
    remove_unfinished_checkpoints(folder)
    damaged = rename_damaged(folder)
    return ResumePoint(newest(folder), renamed, tuple(damaged), tuple(find_strays(folder)))


def refuse_changed_recipe(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Refuse to resume with another recipe.

    Args:
        before, after: the recipe settings of the run folder and of this launch, as dotted key → value.

    Raises:
        ConfigError: settings differ; it names up to three of them with both values.
    """
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    if changed:
        named = ", ".join(
            f"{key} was {format_value(before.get(key))}, now {format_value(after.get(key))}" for key in changed[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"this run started with other settings: {named}{more}. Use the old values to resume, or {START_AGAIN}"
        )


def refuse_changed_validation(folder: RunFolder, contents: dict[str, list[str]]) -> None:
    """Refuse to resume where the same training data have other validation sets: a curve would be of two sets.

    Args:
        contents: see `DataSplit.contents`. Runs of earlier versions have not recorded it.

    Raises:
        ConfigError: it names the sets that changed, or manifest.json cannot be read.
    """
    manifest = folder.path / "manifest.json"
    before = read_json(manifest).get("contents", {})
    if not isinstance(before, dict):
        raise ConfigError(f"{manifest} cannot be read; {START_AGAIN}")
    if before.get("data.path") != contents["data.path"] or [*before.items()] == [*contents.items()]:
        return
    changed = [key for key in before | contents if before.get(key) != contents.get(key)]
    raise ConfigError(
        f"{', '.join(changed) or 'data.val_path'}: the validation sets changed since {folder.path} started; give the"
        f" same names, files and order to resume, or {START_AGAIN}"
    )


def refuse_changed_content(folder: RunFolder, *, data: str, base: str | None) -> None:
    """Refuse to resume where data, tokenizer or base model have changed.

    Args:
        data, base: the fingerprints of what this launch would use.

    Raises:
        ConfigError: one of them has changed, or manifest.json cannot be read.
    """
    manifest = folder.path / "manifest.json"
    try:
        earlier = load_json(read_small_text(manifest))
        pairs = (("the data or the tokenizer", earlier["data"], data), ("the base model", earlier["base"], base))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{manifest} cannot be read; {START_AGAIN}") from None
    for what, before, now in pairs:
        if before != now:
            raise ConfigError(
                f"{what} changed since {folder.path} started (fingerprint {before}, now {now});"
                f" restore the old content to resume, or {START_AGAIN}"
            )
