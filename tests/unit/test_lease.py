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


@pytest.fixture
def path(tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.2)
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
    assert not lease_file(path).exists()


def test_a_process_waits_for_the_lease_and_says_for_whom(path, holder):
    said = []
    threading.Timer(0.5, holder.kill).start()
    # Nobody waits for the killed process, so the kernel keeps it as a zombie.
    with locked(path, waiting=said.append):
        assert said == [f"another process ({holder.pid} on {Holder.here().host})"]


def test_a_process_that_lost_its_lease_to_another_host_ends_with_a_line(path, holder):
    lease_file(path).write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))
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


def test_of_several_that_take_over_a_lease_at_once_one_gets_it(path):
    for _ in range(3):
        lease_file(path).write_text(json.dumps(asdict(replace(Holder.here(), started=1))))
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
    lease_file(path).write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere"))))
    assert is_leased(path)
    os.utime(lease_file(path), (1, 1))
    assert not is_leased(path)
