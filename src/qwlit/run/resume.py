"""Whether a run of this name starts, goes on, or is refused."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwlit.core.errors import ConfigError
from qwlit.core.slurm import job_id
from qwlit.training.checkpointing.checkpoint import (
    find_damage,
    list_checkpoints,
    remove_unfinished_checkpoints,
    step_of,
)
from qwlit.training.tracking.run_folder import FINISHED, RunFolder


@dataclass(frozen=True)
class Start:
    """Where the run begins."""

    checkpoint: Path | None
    renamed_to: Path | None = None
    damaged: tuple[str, ...] = ()
    """What was wrong with newer checkpoints."""

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0


def refuse_occupied_folder(folder: RunFolder, *, overwrite: bool) -> None:
    """Raise ConfigError when the place holds something else, or a finished run that nothing said to overwrite."""
    path = folder.path
    if path.exists() and not folder.holds_run and not (path.is_dir() and _is_bare(folder)):
        raise ConfigError(f"{path} exists and is no run; move it away, or set another run.name")
    if folder.status == FINISHED and not overwrite:
        raise ConfigError(
            f"{folder.path} is finished; train under another name with run.name=…, or again with run.overwrite=true"
        )


def _is_bare(folder: RunFolder) -> bool:
    """Whether the folder is empty, or as a kill -9 leaves it at the very beginning."""
    inside = [*folder.path.iterdir(), *(folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else [])]
    return inside in ([], [folder.checkpoints])


def prepare_folder(folder: RunFolder, *, resume: Literal["auto", "never"], overwrite: bool) -> Start:
    """Make the folder ready: anew, or at the newest good checkpoint of an unfinished run. For rank 0.

    Raises:
        ConfigError: there are checkpoints, and none of them is good.
    """
    aside = None
    if folder.holds_run:
        if overwrite:
            folder.delete()
        elif resume == "never":
            aside = folder.rename_aside()
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    folder.write_summary(status="running", job=job_id())
    remove_unfinished_checkpoints(folder)
    damaged = _walk_back(folder)
    return Start(checkpoint=newest(folder), renamed_to=aside, damaged=damaged)


def _walk_back(folder: RunFolder) -> tuple[str, ...]:
    """Put damaged checkpoints aside, the newest first, until one is good; return what was found.

    A flipped bit loads without a word in every format; only the checksum knows.
    """
    found: list[str] = []
    while checkpoint := newest(folder):
        reason = find_damage(checkpoint)
        if reason is None:
            return tuple(found)
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        found.append(f"{checkpoint.name} is damaged ({reason}), now {aside.name}")
    if found:
        raise ConfigError(
            f"{folder.path} has no good checkpoint left: {'; '.join(found)}."
            " Start anew with resume=never or run.overwrite=true"
        )
    return ()


def newest(folder: RunFolder) -> Path | None:
    """Return the newest whole checkpoint."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def refuse_other_mathematics(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare the settings that shape what is computed, as dotted key → value.

    Raises:
        ConfigError: naming up to three that differ, with both values.
    """
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    if changed:
        named = ", ".join(f"{key} was {before.get(key)}, now {after.get(key)}" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"this run began with other settings: {named}{more}."
            " Go on with the old ones, or start anew with run.name=… or run.overwrite=true"
        )


def refuse_other_content(folder: RunFolder, *, data: str, base: str | None) -> None:
    """Refuse to go on with data, a tokenizer or a base model of other content.

    Args:
        data, base: their fingerprints now.

    Raises:
        ConfigError: naming which of them changed.
    """
    manifest = folder.path / "manifest.json"
    try:
        earlier = json.loads(manifest.read_text(encoding="utf-8"))
        pairs = (("the data or the tokenizer", earlier["data"], data), ("the base model", earlier["base"], base))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{manifest} cannot be read; start anew with run.name=… or run.overwrite=true") from None
    for what, before, now in pairs:
        if before != now:
            raise ConfigError(
                f"{what} changed since {folder.path} began (fingerprint {before}, now {now});"
                " bring the old one back, or start anew with run.name=… or run.overwrite=true"
            )
