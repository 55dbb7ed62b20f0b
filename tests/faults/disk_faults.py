"""Faults of disk, folder, lock and clock, each with what must be said and what mends it: the table of test_disk.py."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from qwlit.core import lease
from qwlit.core.errors import ConfigError
from qwlit.core.files import lock_holder
from qwlit.inference.export import export_model
from qwlit.training.checkpointing.saving import Checkpointing
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.run_lock import RunLock

DISK_MIB = 12
NOBODY = 65534
YEAR = 365 * 86400


@dataclass
class Place:
    """Where a case runs: a disk of its own with the folder runs/, and what changes the system's answers."""

    disk: Path
    monkeypatch: Any
    """pytest's."""
    mended: contextlib.ExitStack

    @property
    def run(self) -> Path:
        return self.disk / "runs" / "a"

    def fill(self, left_kib: int = 0) -> None:
        """Fill the disk."""
        size = max(0, shutil.disk_usage(self.disk).free - left_kib * 1024)
        with contextlib.suppress(OSError), (self.disk / "ballast").open("wb") as handle:
            for start in range(0, size, 4096):
                handle.write(bytes(min(4096, size - start)))

    def use_all_inodes(self) -> None:
        (self.disk / "small").mkdir()
        with contextlib.suppress(OSError):
            for number in range(10**6):
                (self.disk / "small" / str(number)).touch()

    def free(self) -> None:
        (self.disk / "ballast").unlink(missing_ok=True)
        shutil.rmtree(self.disk / "small", ignore_errors=True)

    def lock_elsewhere(self) -> None:
        """A file system with a file that is open for writing, as the lock is, cannot become read-only."""
        self.run.parent.mkdir()
        elsewhere = self.mended.enter_context(tempfile.TemporaryDirectory())
        (self.run.parent / ".locks").symlink_to(elsewhere)

    def remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.disk)], check=True)

    def limit_files(self, size: int = resource.RLIM_INFINITY) -> None:
        """Limit the size of files that this process writes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fail(self, name: str, number: int, *, only: Callable[..., bool] = lambda *arguments: True) -> None:
        """Let a call of the operating system fail."""
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if only(*arguments):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        self.monkeypatch.setattr(os, name, call)

    def without_flock(self, number: int = errno.ENOLCK) -> None:
        def flock(*arguments: Any) -> None:
            raise OSError(number, os.strerror(number))

        self.monkeypatch.setattr("fcntl.flock", flock)

    def become_nobody(self) -> None:
        """Lose root's rights; what the training writes then belongs to `nobody`."""
        os.seteuid(NOBODY)
        self.mended.callback(os.seteuid, 0)

    def give(self, path: Path, owner: int, mode: int = 0o755) -> None:
        """Make an owner the only one who can write a folder."""
        own = os.geteuid()
        os.seteuid(0)
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, owner, owner)
        path.chmod(mode)
        os.seteuid(own)

    def set_clock(self, seconds: float) -> None:
        """Let the system's clock show another time from now on."""
        real = time.time
        self.monkeypatch.setattr(time, "time", lambda: real() + seconds)

    def age_files(self, seconds: float) -> None:
        """Give everything on the disk the times of another day."""
        for path in self.disk.rglob("*"):
            os.utime(path, (time.time() + seconds,) * 2, follow_symlinks=False)

    def set_time_zone(self, name: str) -> None:
        self.monkeypatch.setenv("TZ", name)
        time.tzset()

    def lease(self, *, refreshed: bool = False, seconds: float = 0.0, text: str | None = None, **other: Any) -> None:
        """Let another process hold the run's lease: `other` are its host, pid, …"""
        self.without_flock()
        self.monkeypatch.setattr(lease, "STALE_SECONDS", 0.6)
        lock = RunFolder(self.run).lock_file
        lock.parent.mkdir(parents=True)
        lock.write_text("process 7 on elsewhere\n")
        file = lease.lease_file(lock)
        file.write_text(json.dumps(asdict(replace(lease.Holder.here(), **other))) if text is None else text)
        os.utime(file, (time.time() + seconds,) * 2)
        if refreshed:
            ended = threading.Event()

            def refresh() -> None:
                while not ended.wait(0.1):
                    os.utime(file, (time.time() + seconds,) * 2)

            thread = threading.Thread(target=refresh)
            thread.start()
            self.mended.callback(thread.join)
            self.mended.callback(ended.set)
            self.mended.callback(lambda: time.sleep(0.2))


class At(Callback):
    """Does something before a step, when the save before it is written, or after the last step."""

    def __init__(self, actions: dict[int | str, Callable[[], object]]) -> None:
        self._actions = actions

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if action := self._actions.get(batch.step + 1):
            next(c for c in trainer.callbacks if isinstance(c, Checkpointing))._writer.join()
            action()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._actions.get("end", lambda: None)()


Action = Callable[[Place], object]


@dataclass
class Fault:
    """One case.

    The run has 8 steps and saves after every second one. `before` acts before it starts, `at` before a step ("end":
    after the last one). `said` is in its output; `code` is 0 where the training goes on. Then `mend` acts, and the same
    command must end like an uninterrupted run, having resumed from `resumed_from`.
    """

    said: list[str] = field(default_factory=list)
    code: int = 0
    before: Action | None = None
    at: dict[int | str, Action] = field(default_factory=dict)
    mend: Action | None = None
    resumed_from: int | None = None
    cut: bool = False
    """An earlier launch ended with an error before step 6."""
    lost: bool = False
    """metrics.jsonl has only the records after the fault."""
    check: Action | None = None
    """What else must be true after the first run."""
    mounted: bool = False
    """Needs a file system of its own, and root."""
    as_root: bool = False


def end_early() -> None:
    raise ConfigError("cut here")


GOES_ON = "The training goes on"
AGAIN = "run the same command"
full = Place.fill
free = Place.free


def both(*actions: Action) -> Action:
    return lambda place: [action(place) for action in actions]


def fill_after_export(place: Place) -> None:
    def export_and_fill(*arguments: Any, **options: Any) -> None:
        export_model(*arguments, **options)
        place.fill()

    place.monkeypatch.setattr("qwlit.run.finish.export_model", export_and_fill)


def _full_with(left_kib: int) -> Fault:
    """The disk has so little space at the start that some file of the start or the first save does not fit."""
    return Fault(["No space left on device", "free"], 2, partial(full, left_kib=left_kib), mend=free, mounted=True)


def _owner(mode: int, *, at: str = "") -> Action:
    def act(place: Place) -> None:
        place.give(place.run / at, 0, mode)

    return act


def _nobody(place: Place) -> None:
    place.give(place.disk, NOBODY)
    place.become_nobody()


def _nobody_then_root_folder(place: Place) -> None:
    _nobody(place)
    place.run.parent.mkdir()
    place.give(place.run, 0)


def _nobody_under_root(place: Place) -> None:
    place.give(place.disk, 0)
    place.become_nobody()


def absent(path: Path) -> None:
    assert not os.path.lexists(path)


def is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


def is_open_as(name: str, descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name == name


def put_in_place(path: Path, make: Callable[[Path], object]) -> None:
    path.rename(path.with_name("held"))
    make(path)


def put_back(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.with_name("held").rename(path)


def rename_run(place: Place) -> None:
    place.run.rename(place.run.with_name("b"))


def rename_back(place: Place) -> None:
    absent(place.run)
    place.run.with_name("b").rename(place.run)


def remove(name: str) -> Action:
    def act(place: Place) -> None:
        path = place.run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def cut_off(place: Place) -> None:
    os.truncate(place.run / "metrics.jsonl", 10)


def stray(name: str, make: Callable[[Path], object]) -> Action:
    return lambda place: make(place.run / "checkpoints" / name)


def fill_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def add_strays(place: Place) -> None:
    inside = place.run / "checkpoints"
    (inside / "notes.txt").write_text("mine")
    (inside / "step-000099").symlink_to("nowhere")
    (inside / "step-12").write_text("no folder")
    fill_folder(inside / "old")
    (inside / ".hidden").mkdir()
    (inside / "old").chmod(0)
    for name in ("best", "last"):
        (inside / name).unlink()
        fill_folder(inside / name)


def link_elsewhere(place: Place) -> None:
    (place.disk / "elsewhere").mkdir()
    place.run.parent.mkdir()
    place.run.symlink_to("../elsewhere")


def link_nowhere(place: Place) -> None:
    place.run.parent.mkdir()
    place.run.symlink_to("../elsewhere")


def has_status(place: Place, status: str) -> None:
    assert RunFolder(place.run).status == status


def has_pointer_files(place: Place) -> None:
    for name in ("best", "last"):
        assert (place.run / "checkpoints" / name).read_text() in ("step-000008\n", "step-000006\n")


def sealed(place: Place) -> None:
    from qwlit.training.checkpointing.folder import list_checkpoints
    from qwlit.training.checkpointing.manifest import find_damage, read_seals

    checkpoints = list_checkpoints(RunFolder(place.run))
    assert not any(map(find_damage, checkpoints)) and len(read_seals(place.run)) == len(checkpoints) == 4


def _hide(place: Place) -> None:
    """Take the right to read a folder from its owner, after a run by root."""
    os.seteuid(0)
    for path in (place.disk, *place.disk.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    (place.run / "checkpoints").chmod(0)
    os.seteuid(NOBODY)


def hold(name: str) -> Action:
    """Hold the lock of the folder under a name, until the fault is mended."""

    def act(place: Place) -> None:
        place.mended.enter_context(RunLock(RunFolder(place.run.parent / name)))

    return act


def link_run(*names: str) -> Action:
    """Make the run's name, and others, links in a chain to one folder."""

    def act(place: Place) -> None:
        (place.disk / "data" / "real").mkdir(parents=True)
        place.run.parent.mkdir()
        target = "../data/real"
        for name in (*names, "a"):
            (place.run.parent / name).symlink_to(target)
            target = name

    return act


def link(name: str, target: str) -> Action:
    return lambda place: (place.run.parent / name).symlink_to(target)


def let_go(place: Place) -> None:
    place.mended.close()


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def has_no_lease(place: Place) -> None:
    lock = RunFolder(place.run).lock_file
    assert not lease.is_leased(lock) and lease.lease_file(lock).read_text().strip() == lease.FREE
    assert len(list(lock.parent.glob("*.lease.*"))) == 1


def remove_lease(place: Place) -> None:
    assert lock_holder(RunFolder(place.run).lock_file) == "another process (7 on elsewhere)"
    lease.lease_file(RunFolder(place.run).lock_file).unlink()


def moved_clock(seconds: float) -> Action:
    return lambda place: place.set_clock(seconds)


DISK: dict[str, Fault] = {
    **{f"full at the start, {left} KiB left": _full_with(left) for left in (0, 4, 16, 40)},
    "full from step 3 on": Fault(
        ["the checkpoint of step 8 could not be written: No space left", f"free disk space and {AGAIN}", "step 2"],
        2,
        at={3: full},
        mend=free,
        resumed_from=2,
        mounted=True,
    ),
    "full from step 3 to 5": Fault(
        ["the checkpoint of step 4 could not be written: No space left", GOES_ON],
        at={3: full, 5: free},
        mounted=True,
    ),
    "full in the last step": Fault(
        ["the last step could not be saved; free disk space", "step 6"],
        2,
        at={8: full},
        mend=free,
        resumed_from=6,
        mounted=True,
    ),
    "full before the export": Fault(
        ["export: No space left on device; free disk space and run"],
        2,
        at={"end": full},
        mend=free,
        resumed_from=8,
        mounted=True,
    ),
    "full after the export": Fault(
        ["runs/a/summary.json: No space left on device; free disk space and run"],
        2,
        fill_after_export,
        mend=both(free, lambda place: place.monkeypatch.undo()),
        resumed_from=8,
        mounted=True,
    ),
    "no inode left from step 3 to 5": Fault(
        ["the checkpoint of step 4 could not be written: No space left", GOES_ON],
        at={3: Place.use_all_inodes, 5: free},
        mounted=True,
    ),
    "read-only at the start": Fault(
        ["Read-only file system; make the file system writable"],
        2,
        lambda place: place.remount("ro"),
        mend=lambda place: place.remount("rw"),
        mounted=True,
    ),
    "read-only from step 3 on": Fault(
        ["step 8 could not be written: Read-only file system", "make the file system writable and run"],
        2,
        before=Place.lock_elsewhere,
        at={3: lambda place: place.remount("ro")},
        mend=lambda place: place.remount("rw"),
        resumed_from=2,
        mounted=True,
    ),
    "read-only from step 3 to 5": Fault(
        ["metrics.jsonl cannot be written: Read-only file system", GOES_ON, "is written again, and lacks nothing"],
        before=Place.lock_elsewhere,
        at={3: lambda place: place.remount("ro"), 5: lambda place: place.remount("rw")},
        mounted=True,
    ),
    "files limited in size from step 3 on": Fault(
        ["the checkpoint of step 8 could not be written: File too large", "(ulimit -f) and run"],
        2,
        check=lambda place: has_status(place, "failed"),
        at={3: lambda place: place.limit_files(20_000)},
        mend=Place.limit_files,
        resumed_from=2,
    ),
    "files limited in size from step 3 to 5": Fault(
        ["the checkpoint of step 4 could not be written: File too large"],
        at={3: lambda place: place.limit_files(20_000), 5: Place.limit_files},
    ),
    "metrics.jsonl on a full device from step 3 to 5": Fault(
        ["metrics.jsonl cannot be written: No space left", "metrics.jsonl is written again, and lacks nothing"],
        at={
            3: lambda place: put_in_place(place.run / "metrics.jsonl", lambda path: path.symlink_to("/dev/full")),
            5: lambda place: put_back(place.run / "metrics.jsonl"),
        },
    ),
    "metrics.jsonl on a full device from step 3 on, and the run ends with an error": Fault(
        ["metrics.jsonl cannot be written: No space left", "cut here"],
        2,
        at={
            3: lambda place: put_in_place(place.run / "metrics.jsonl", lambda path: path.symlink_to("/dev/full")),
            6: lambda place: end_early(),
        },
        mend=lambda place: put_back(place.run / "metrics.jsonl"),
        resumed_from=4,
    ),
    "full at step 3, and Ctrl-C": Fault(
        ["step 3 could not be saved; runs/a resumes from step 2"],
        130,
        at={3: both(full, lambda place: signal.raise_signal(signal.SIGINT))},
        mend=free,
        resumed_from=2,
        mounted=True,
    ),
    "full at step 3, and SIGTERM": Fault(
        ["step 3 could not be saved; runs/a resumes from step 2"],
        75,
        at={3: both(full, lambda place: signal.raise_signal(signal.SIGTERM))},
        mend=free,
        resumed_from=2,
        mounted=True,
    ),
    "fsync fails from step 3 on": Fault(
        ["the checkpoint of step 8 could not be written: Input/output error", "check the disk and run"],
        2,
        at={3: lambda place: place.fail("fsync", errno.EIO)},
        mend=lambda place: place.monkeypatch.undo(),
        resumed_from=2,
    ),
    "fsync fails from step 3 to 5": Fault(
        ["the checkpoint of step 4 could not be written: Input/output error", GOES_ON],
        at={3: lambda place: place.fail("fsync", errno.EIO), 5: lambda place: place.monkeypatch.undo()},
        check=lambda place: absent(place.run / "checkpoints/step-000004"),
    ),
    "fsync of checkpoints/ fails at step 4": Fault(
        ["the checkpoint of step 4 could not be written: Input/output error", GOES_ON],
        at={
            3: lambda place: place.fail("fsync", errno.EIO, only=partial(is_open_as, "checkpoints")),
            5: lambda place: place.monkeypatch.undo(),
        },
        check=lambda place: absent(place.run / "checkpoints/step-000004"),
    ),
    "folders that cannot be synced": Fault(before=lambda place: place.fail("fsync", errno.EINVAL, only=is_folder)),
}


FOLDER: dict[str, Fault] = {
    "run folder renamed at step 3 and back at step 5": Fault(
        ["metrics.jsonl cannot be written: No such file", "put back what was removed or renamed", "lacks nothing"],
        at={3: rename_run, 5: rename_back},
    ),
    "run folder renamed at step 3": Fault(
        ["step 8 could not be written: No such file", f"put back what was removed or renamed and {AGAIN}"],
        2,
        at={3: rename_run},
        mend=rename_back,
        resumed_from=2,
    ),
    "run folder removed at step 3": Fault(
        ["put back what was removed or renamed"], 2, at={3: remove("")}, check=lambda place: absent(place.run)
    ),
    "checkpoints/ removed at step 5": Fault(at={5: remove("checkpoints")}),
    "metrics.jsonl removed at step 3": Fault(
        ["metrics.jsonl was removed or cut off during the run: its records of before are gone"],
        at={3: remove("metrics.jsonl")},
        lost=True,
    ),
    "metrics.jsonl cut off at step 3": Fault(
        ["metrics.jsonl was removed or cut off during the run"], at={3: cut_off}, lost=True
    ),
    "events.jsonl removed at step 5": Fault(
        ["events.jsonl was removed or cut off"], at={5: remove("events.jsonl")}, check=sealed
    ),
    "events.jsonl a folder from step 3 to 7": Fault(
        [
            "events.jsonl cannot be written: Is a directory; a folder has the name of a file: move it away",
            "lacks nothing",
        ],
        at={
            3: lambda place: put_in_place(place.run / "events.jsonl", Path.mkdir),
            7: lambda place: put_back(place.run / "events.jsonl"),
        },
        check=sealed,
    ),
    "summary.json removed at step 3": Fault(at={3: remove("summary.json")}),
    "config.yaml removed at step 3": Fault(at={3: remove("config.yaml")}),
    "export/ a file": Fault(
        ["export: File exists; move away"],
        2,
        at={3: lambda place: (place.run / "export").touch()},
        mend=remove("export"),
        resumed_from=8,
    ),
    "no symbolic links": Fault(before=lambda place: place.fail("symlink", errno.EPERM), check=has_pointer_files),
    "a file where step 4 is to be saved": Fault(at={3: stray("step-000004", Path.touch)}),
    "a folder where step 4 is to be saved": Fault(at={3: stray("step-000004", fill_folder)}),
    "a broken link where step 4 is to be saved": Fault(at={3: stray("step-000004", lambda p: p.symlink_to("nowhere"))}),
    "strays in checkpoints/, best and last folders": Fault(
        ["passed over: best, last, notes.txt, old, step-000099", "checkpoints/last is a folder; move it away"],
        before=add_strays,
        cut=True,
    ),
    "checkpoints/ unreadable": Fault(
        ["checkpoints: Permission denied; give this user the right"],
        2,
        lambda place: (_nobody(place), _hide(place)),
        mend=lambda place: place.give(place.run / "checkpoints", NOBODY),
        resumed_from=4,
        cut=True,
        as_root=True,
    ),
    "run folder of another user": Fault(
        ["Permission denied; give this user the right to read and write it and run"],
        2,
        _nobody_then_root_folder,
        mend=lambda place: place.give(place.run, NOBODY),
        as_root=True,
    ),
    "run.root of another user": Fault(
        ["Permission denied; give this user the right to read and write it"],
        2,
        _nobody_under_root,
        mend=lambda place: place.give(place.disk, NOBODY),
        as_root=True,
    ),
    "checkpoints/ given to another user at step 3": Fault(
        ["the checkpoint of step 8 could not be written: Permission denied", "give this user the right"],
        2,
        _nobody,
        at={3: _owner(0o755, at="checkpoints")},
        mend=lambda place: place.give(place.run / "checkpoints", NOBODY),
        resumed_from=2,
        as_root=True,
    ),
    "run folder a link": Fault(before=link_elsewhere),
    "run folder a broken link": Fault(
        ["links to ../elsewhere, which does not exist; create it"],
        2,
        link_nowhere,
        mend=lambda place: (place.disk / "elsewhere").mkdir(),
    ),
    "run folder a file": Fault(
        ["exists and is not a run; move it away"],
        2,
        lambda place: (place.run.parent.mkdir(), place.run.touch()),
        mend=lambda place: place.run.unlink(),
    ),
    "run.root a file": Fault(
        ["runs", "move"], 2, lambda place: place.run.parent.touch(), mend=lambda place: place.run.parent.unlink()
    ),
}


IN_USE = "is in use by another process ("
OVER = ".locks/a.lease.1 from "

LOCK: dict[str, Fault] = {
    "held under the same name": Fault([IN_USE], 2, hold("a"), mend=let_go),
    "held under the name to which it links": Fault([IN_USE], 2, both(link_run("b"), hold("b")), mend=let_go),
    "held under another link": Fault([IN_USE], 2, both(link_run(), link("c", "../data/real"), hold("c")), mend=let_go),
    "held under its own path": Fault([IN_USE], 2, both(link_run(), hold("../data/real")), mend=let_go),
    "held under a link to it": Fault(
        [IN_USE], 2, both(lambda place: place.run.mkdir(parents=True), link("b", "a"), hold("b")), mend=let_go
    ),
    **{
        f"no flock: {errno.errorcode[number]}": Fault(
            before=partial(Place.without_flock, number=number), check=has_no_lease
        )
        for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    },
    "a lease whose holder has ended": Fault(
        ["took over", OVER, "which has ended"], before=lambda place: place.lease(pid=dead_pid()), check=has_no_lease
    ),
    "a lease whose process id is another process now": Fault(
        ["took over", "which has ended"], before=lambda place: place.lease(started=1), check=has_no_lease
    ),
    "a lease of a process that runs": Fault([IN_USE], 2, lambda place: place.lease(), mend=remove_lease),
    "a lease of another host that is refreshed": Fault(
        [IN_USE],
        2,
        lambda place: place.lease(host="elsewhere", refreshed=True),
        mend=lambda place: (let_go(place), time.sleep(0.7)),
    ),
    "a lease of another host that is not refreshed": Fault(
        ["process 1 on elsewhere holds", "took over", "has not refreshed it for 0.6 s"],
        before=lambda place: place.lease(host="elsewhere", pid=1),
    ),
    "a lease from before this machine's restart": Fault(
        ["took over", "has not refreshed it"], before=lambda place: place.lease(system="another boot")
    ),
    "a lease cut off while it was written": Fault(
        ["took over", "from a process, which has not refreshed it"], before=lambda place: place.lease(text="")
    ),
    "a lease that is no lease": Fault(
        ["took over", "has not refreshed it"], before=lambda place: place.lease(text='{"pid": [1]}')
    ),
    ".locks a file": Fault(
        ["cannot be written", "move"],
        2,
        lambda place: (place.run.parent.mkdir(), (place.run.parent / ".locks").touch()),
        mend=lambda place: (place.run.parent / ".locks").unlink(),
    ),
    ".locks removed at step 3": Fault(at={3: lambda place: shutil.rmtree(place.run.parent / ".locks")}),
}


CLOCK: dict[str, Fault] = {
    "files of the year to come at the resume": Fault(before=lambda place: place.age_files(YEAR), cut=True),
    "files of 1970 at the resume": Fault(before=lambda place: place.age_files(60 - time.time()), cut=True),
    "clock set back a year at the resume": Fault(before=moved_clock(-YEAR), cut=True),
    "clock set forward ten years at the resume": Fault(before=moved_clock(10 * YEAR), cut=True),
    "clock set back at step 3": Fault(at={3: moved_clock(-YEAR)}),
    "clock set forward at step 3": Fault(at={3: moved_clock(YEAR)}),
    "another time zone at the resume": Fault(before=lambda place: place.set_time_zone("Asia/Kathmandu"), cut=True),
    "a lease with a time to come, its holder dead": Fault(
        ["took over", "which has ended"], before=lambda place: place.lease(pid=dead_pid(), seconds=YEAR)
    ),
    "a lease of another host with a time to come, not refreshed": Fault(
        ["took over", "has not refreshed it"], before=lambda place: place.lease(host="elsewhere", seconds=YEAR)
    ),
    "a lease of another host whose clock is behind, refreshed": Fault(
        [IN_USE],
        2,
        lambda place: place.lease(host="elsewhere", refreshed=True, seconds=-YEAR),
        mend=lambda place: (let_go(place), time.sleep(0.7)),
    ),
}

TABLES = {"disk": DISK, "folder": FOLDER, "lock": LOCK, "clock": CLOCK}
FAULTS = {f"{kind}: {name}": fault for kind, table in TABLES.items() for name, fault in table.items()}
