"""The checkpoints of a run folder: which there are, which are good, and the pointers `best` and `last`."""

import os
import re
import shutil
from pathlib import Path

from qwlit.core.disk import disk_line
from qwlit.core.errors import ConfigError
from qwlit.core.files import read_small_text
from qwlit.training.checkpointing.manifest import find_damage, read_seals, step_of
from qwlit.training.tracking.run_folder import RunFolder

DAMAGED = "damaged"
OWN_NAME = re.compile(rf"({DAMAGED}\d*-)?step-\d+")
POINTERS = ("best", "last")


def list_checkpoints(folder: RunFolder) -> list[Path]:
    """Return the checkpoints, oldest first. `find_damage` says whether one is good.

    Raises:
        OSError: the folder cannot be read. It may have checkpoints, so the run must not begin anew.
    """
    inside = folder.checkpoints.iterdir() if folder.checkpoints.is_dir() else ()
    found = (path for path in inside if path.name.startswith("step-") and OWN_NAME.fullmatch(path.name))
    return sorted((path for path in found if path.is_dir()), key=step_of)


def list_damaged(folder: RunFolder) -> list[Path]:
    """Return the checkpoints that were renamed because they are damaged."""
    found = folder.checkpoints.glob(f"{DAMAGED}*-step-*")
    return sorted(path for path in found if OWN_NAME.fullmatch(path.name) and path.is_dir())


def newest(folder: RunFolder) -> Path | None:
    """Return the newest checkpoint; None where there is none."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def rename_damaged(folder: RunFolder) -> list[str]:
    """Rename damaged checkpoints, the newest first, until one is good; return what is wrong with each.

    Every file format loads a flipped bit without an error; only the checksum detects it.

    Raises:
        ConfigError: the run has saved checkpoints, and none of them is good.
    """
    found: list[str] = []
    while checkpoint := newest(folder):
        reason = find_damage(checkpoint)
        if reason is None:
            return found
        renamed = _free_name(checkpoint, DAMAGED)
        checkpoint.rename(renamed)
        found.append(f"{checkpoint.name} is damaged ({reason}), now {renamed.name}")
    _refuse_lost_checkpoints(folder, found)
    return found


def _free_name(path: Path, prefix: str) -> Path:
    """Return a name for what is renamed; it keeps what was renamed before."""
    index, renamed = 1, path.with_name(f"{prefix}-{path.name}")
    while os.path.lexists(renamed):
        index += 1
        renamed = path.with_name(f"{prefix}{index}-{path.name}")
    return renamed


def move_away(path: Path) -> None:
    """Rename what has the name of a checkpoint that is to be written, such as a file or a link to nothing."""
    if os.path.lexists(path):
        path.rename(_free_name(path, "stray"))


def _refuse_lost_checkpoints(folder: RunFolder, damaged_now: list[str]) -> None:
    """Refuse to train from step 0 what has already been saved at a later step."""
    what = "; ".join(damaged_now) or ", ".join(path.name for path in list_damaged(folder))
    if not what and not (steps := read_seals(folder.path)):
        return
    missing = what or f"events.jsonl lists one of step {max(steps)}, and {folder.checkpoints} has none"
    raise ConfigError(
        f"{folder.path} has no good checkpoint left: {missing}. Restore its files under the name step-…, or start again"
        " with resume=never or run.overwrite=true"
    )


def find_strays(folder: RunFolder) -> list[str]:
    """Return the names in checkpoints/ that are neither checkpoints nor pointers to them."""
    inside = (path for path in folder.checkpoints.iterdir() if not path.name.startswith("."))
    return sorted(
        path.name
        for path in inside
        if not (OWN_NAME.fullmatch(path.name) and path.is_dir())
        and not (path.name in POINTERS and linked_checkpoint(folder, path.name))
    )


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint. Rename it first, so that a half-deleted folder never looks like a checkpoint."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    renamed = temporary_folder(checkpoint)
    checkpoint.rename(renamed)
    shutil.rmtree(renamed)


def temporary_folder(checkpoint: Path) -> Path:
    """Return the folder that holds a checkpoint while it is written or deleted."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def remove_unfinished_checkpoints(folder: RunFolder) -> None:
    """Remove checkpoints that a kill -9 left half written or half deleted."""
    for leftover in folder.checkpoints.glob(".*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def link_checkpoint(folder: RunFolder, name: str, checkpoint: Path) -> str | None:
    """Make `checkpoints/<name>` point to `checkpoint`, atomically: a link, or a text file where links are impossible.

    Returns why it cannot be done; None where it is done.
    """
    temporary = folder.checkpoints / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(checkpoint.name)
        except OSError:  # such as on exFAT and on some network file systems
            temporary.write_text(checkpoint.name + "\n", encoding="utf-8")
        temporary.replace(folder.checkpoints / name)
    except IsADirectoryError:
        temporary.unlink()
        return f"{folder.checkpoints / name} is a folder; move it away, and the next save links it to its checkpoint"
    except OSError as error:
        error.filename, error.filename2 = str(folder.checkpoints / name), None
        return f"{disk_line(error)}. It may name an older checkpoint until the next save"
    return None


def linked_checkpoint(folder: RunFolder, name: str) -> Path | None:
    """Return the checkpoint that the pointer `best` or `last` points to; None where there is none."""
    pointer = folder.checkpoints / name
    try:
        target = str(pointer.readlink()) if pointer.is_symlink() else read_small_text(pointer).strip()
    except (OSError, ValueError):
        return None
    return next((path for path in list_checkpoints(folder) if path.name == Path(target).name), None)
