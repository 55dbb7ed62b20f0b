"""MANIFEST.json proves that a checkpoint folder holds what was written, and nothing else.

It lists the checkpoint's files with their sizes and sha256. Its own sha256, the seal, stands in the run's events.jsonl.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

from qwlit.core.disk import OF_THE_FILE, naming_path
from qwlit.core.files import read_json_lines, write_json_atomic

MANIFEST = "MANIFEST.json"
STATE = "training_state.pt"
WEIGHTS, MOMENTS = "model", "optimizer"
"""File names before `.safetensors`, or before `-00001-of-00002.safetensors` where each rank wrote its shard slices."""
SAVED = "checkpoint"
"""The event in events.jsonl that records a checkpoint; its `manifest` is the seal."""
ROLLBACK = "rollback"
"""The event that records that the run goes back to its step; checkpoints of later steps recorded before are void."""
LARGEST_MANIFEST = 2**24
"""Bytes: an entry has about 150, so this is a hundred thousand files."""


def step_of(checkpoint: Path) -> int:
    """Return the number of steps done when `checkpoint` (step-000100, damaged-step-000100) was written."""
    return int(checkpoint.name.rpartition("step-")[2])


def shard_file(stem: str, rank: int, count: int) -> str:
    """Return the name of the file that this rank writes, where `count` ranks write shard slices."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{rank + 1:05d}-of-{count:05d}.safetensors"


def shard_files(stem: str, count: int) -> list[str]:
    """Return the names of all files of a stem, in the order of their slices."""
    return [shard_file(stem, rank, count) for rank in range(count)]


def write_manifest(checkpoint: Path, facts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write the manifest; call it when all other files are on the disk.

    Args:
        facts: what else must be as it was: `step`, `world_size`, and the fingerprints `recipe` and `data`.
        files: name → its bytes and sha256.
    """
    write_json_atomic(checkpoint / MANIFEST, {**facts, "files": dict(files)})


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint in which `find_damage` finds nothing."""
    with naming_path(checkpoint / MANIFEST):
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
    return manifest


def num_shards(manifest: Mapping[str, Any]) -> int:
    """Return how many files the weights are in; the moments are in as many."""
    return (len(manifest["files"]) - 1) // 2


def seal_of(checkpoint: Path) -> str:
    """Return the sha256 of the manifest, for events.jsonl."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


class _DamageError(Exception):
    """What is wrong with a checkpoint."""


def find_damage(checkpoint: Path, *, rank: int = 0, count: int = 1) -> str | None:
    """Compare a checkpoint with its manifest and its seal; return what is wrong, None where nothing is.

    Args:
        checkpoint: its folder, or a link to it. The seal is that of the run in whose folder it stands.
        rank, count: this rank's place among those that each hash a part of the files.

    Raises:
        OSError: a file cannot be read, and may be good, see `core.disk.OF_THE_FILE`.
    """
    seals, checkpoint = read_seals(checkpoint.absolute().parent.parent), checkpoint.resolve()
    try:
        if not _is_regular(checkpoint / MANIFEST) or (checkpoint / MANIFEST).stat().st_size > LARGEST_MANIFEST:
            raise _DamageError(f"{MANIFEST} is not a file that qwlit wrote")
        manifest = read_manifest(checkpoint)
        _check_seal(checkpoint, manifest, seals)
        _check_names(checkpoint, manifest)
        for name in sorted(manifest["files"])[rank::count]:
            if _describe(checkpoint / name) != manifest["files"][name]:
                raise _DamageError(f"{name} does not match its checksum")
    except _DamageError as damage:
        return str(damage)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        return f"{Path(error.filename or MANIFEST).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def _check_seal(checkpoint: Path, manifest: dict[str, Any], seals: Mapping[int, str | None]) -> None:
    step = step_of(checkpoint)
    if manifest["step"] != step:
        raise _DamageError(f"{MANIFEST} is of step {manifest['step']}")
    # Earlier versions recorded no seals.
    if seals.get(step) not in (None, seal_of(checkpoint)):
        raise _DamageError(f"{MANIFEST} is not the one of which events.jsonl has the hash")
    # A kill between the writing of a checkpoint and of its event leaves the newest one without an event.
    if step not in seals and step < max(seals, default=0):
        raise _DamageError("events.jsonl lists no checkpoint of this step")


def _check_names(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Check that the listed files are those of a checkpoint, and that there are no others."""
    listed, count = set(manifest["files"]), num_shards(manifest)
    if listed != {STATE, *shard_files(WEIGHTS, count), *shard_files(MOMENTS, count)}:
        raise _DamageError(f"{MANIFEST} does not list the files of a checkpoint")
    # Hidden files are those of a file system or a file manager, and nothing reads them.
    found = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    for name in sorted(found ^ listed):
        raise _DamageError(f"{name} is missing" if name in listed else f"{name} is no part of it")
    for name in sorted(listed):
        if not _is_regular(checkpoint / name):
            raise _DamageError(f"{name} is not a regular file")


def read_seals(run_folder: Path) -> dict[int, str | None]:
    """Return step → seal of every checkpoint in the run's events.jsonl; None where an earlier version recorded none."""
    seals: dict[int, str | None] = {}
    for event in read_json_lines(run_folder / "events.jsonl"):
        step, kind = event.get("step"), event.get("event")
        if kind == SAVED and isinstance(step, int):
            seals[step] = event.get("manifest")
        elif kind == ROLLBACK and isinstance(step, int):
            seals = {saved: seal for saved, seal in seals.items() if saved <= step}
    return seals


def _is_regular(path: Path) -> bool:
    return S_ISREG(path.lstat().st_mode)


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "sha256": _digest(path, status.st_ino, status.st_size, status.st_mtime_ns)}


def forget_hashes() -> None:
    """Hash every file again from now on: a disk can change a file and leave its size and time as they were."""
    _digest.cache_clear()


@lru_cache
def _digest(path: Path, inode: int, size: int, changed: int) -> str:
    """Return the file's sha256. A launch chooses a checkpoint and then reads it; until then it hashes a file once."""
    with naming_path(path), path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
