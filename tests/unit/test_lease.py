"""Leases: one holder at a time, also when several processes take over at once, and none that lives on unnoticed."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from qwlit.core import lease as leases
from qwlit.core.files import is_locked, locked
from qwlit.core.lease import Holder, is_leased, lease, lease_file

HOLD = """
import fcntl, os, sys, time
from pathlib import Path
from qwlit.core import files, lease

def flock(*arguments):
    raise OSError(37, "No locks available")

fcntl.flock = flock
lease.REFRESH_SECONDS = 0.05
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


DEAD = json.dumps(asdict(replace(Holder.here(), started=1)))
ELSEWHERE = json.dumps(asdict(replace(Holder.here(), host="elsewhere")))


@pytest.fixture
def path(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
    leases._say_once.cache_clear()
    return tmp_path / "lock"


@pytest.fixture
def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lease_is_held_as_long_as_its_process_lives_and_free_after_kill_9(path, holder, capsys):
    assert is_locked(path)
    with pytest.raises(BlockingIOError), locked(path, blocking=False):
        pass
    holder.kill()
    holder.wait()
    assert not is_locked(path)
    with locked(path, blocking=False):
        assert is_locked(path)
    assert f"from process {holder.pid} on" in capsys.readouterr().err
    assert not is_leased(path)
    assert [file.name for file in path.parent.glob("*.lease.*")] == ["lock.lease.2"]


def test_a_process_waits_for_the_lease_and_says_for_whom(path, holder):
    said = []
    threading.Timer(0.5, holder.kill).start()
    # Nobody waits for the killed process, so the kernel keeps it as a zombie.
    with locked(path, waiting=said.append):
        assert said == [f"another process ({holder.pid} on {Holder.here().host})"]


def test_a_process_that_lost_its_lease_to_another_host_ends_with_a_line(path, holder):
    lease_file(path).write_text(ELSEWHERE)
    assert holder.wait(timeout=10) == 2
    assert "another process took" in holder.stderr.read()
    assert lease_file(path).exists()


def test_a_lease_that_was_removed_is_written_again(path, holder):
    lease_file(path).unlink()
    end = time.monotonic() + 10
    while not lease_file(path).exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert is_leased(path) and holder.poll() is None


def test_a_process_that_was_suspended_before_it_takes_a_free_lease_takes_none(path, monkeypatch):
    """Others took the lease, released it and took it again meanwhile."""
    lease_file(path).write_text(DEAD)
    create, later = leases._create, []

    def suspended(file, text):
        monkeypatch.setattr(leases, "_create", create)
        for _ in range(2):
            with lease(path, blocking=False, waiting=lambda: None):
                pass
        later.append(lease(path, blocking=False, waiting=lambda: None))
        later[0].__enter__()
        return create(file, text)

    monkeypatch.setattr(leases, "_create", suspended)
    with pytest.raises(BlockingIOError), lease(path, blocking=False, waiting=lambda: None):
        pass
    assert lease_file(path).name == "lock.lease.4" and is_leased(path)
    later[0].__exit__(None, None, None)
    assert [file.name for file in path.parent.glob("*.lease.*")] == ["lock.lease.4"]


def test_a_lease_of_another_host_is_held_whatever_the_clock_of_this_one_shows(path, monkeypatch):
    lease_file(path).write_text(ELSEWHERE)
    now = time.time_ns
    for seconds in (-90, 90, 10**8):
        monkeypatch.setattr("time.time_ns", lambda seconds=seconds: now() + seconds * 10**9)
        assert is_leased(path)


def test_a_process_that_waits_for_another_host_says_so_once(path, capsys):
    file, ended = lease_file(path), threading.Event()
    file.write_text(ELSEWHERE)

    def refresh():
        for _ in range(12):
            os.utime(file)
            time.sleep(0.1)
        file.write_text("free")

    refreshing = threading.Thread(target=refresh)
    refreshing.start()
    with lease(path, blocking=True, waiting=ended.set):
        assert ended.is_set()
    refreshing.join()
    assert capsys.readouterr().err.count("waiting up to") == 1


def test_a_link_in_place_of_a_lock_is_not_followed(path, tmp_path):
    for file in (path, lease_file(path)):
        file.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="symbolic links"), locked(path):
            pass
        file.unlink()
    assert not (tmp_path / "elsewhere").exists()


def test_of_several_that_take_over_a_lease_at_once_one_gets_it(path):
    for _ in range(3):
        lease_file(path).write_text(DEAD)
        inside, most, all_here = [], [], threading.Barrier(6)

        def take(inside=inside, most=most, all_here=all_here):
            all_here.wait()
            with lease(path, blocking=True, waiting=lambda: None):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.01)
                inside.pop()

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 6


def test_a_lease_of_another_host_counts_as_held_while_it_is_fresh(path):
    lease_file(path).write_text(ELSEWHERE)
    assert is_leased(path)
    os.utime(lease_file(path), (1, 1))
    assert not is_leased(path)
