"""Run the command line and write what memory and time it took: `python -m tests.faults.measured RESULT WORDS…`.

The result is the peak of this process above where it began, and the peaks of the processes that it started, in MiB. The
data are tokenized in this process alone, as on one core: each tokenizing process has as much as Python and its imports.
"""

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

SAMPLED_SECONDS = 0.01


def _memory(pid, field):
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def _children():
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def _measure_children(peaks, ended):
    while not ended.wait(SAMPLED_SECONDS):
        for pid in _children():
            if b"_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                peaks[pid] = max(peaks.get(pid, 0.0), _memory(pid, "VmHWM"))


def measure(result, words):
    from qwlit.__main__ import main

    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    # From here on, VmHWM is the peak of this process alone.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("self", "VmRSS")
    peaks, ended, began = {}, threading.Event(), time.monotonic()
    watch = threading.Thread(target=_measure_children, args=(peaks, ended))
    watch.start()
    sys.argv = ["qwlit", *words]
    try:
        return main()
    finally:
        ended.set()
        watch.join()
        added = _memory("self", "VmHWM") - before
        seconds = time.monotonic() - began
        Path(result).write_text(json.dumps({"added": added, "children": sorted(peaks.values()), "seconds": seconds}))


if __name__ == "__main__":
    sys.exit(measure(sys.argv[1], sys.argv[2:]))
