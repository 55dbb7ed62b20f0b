"""Run qwlit as `python -m tests.faults.watched SUBCOMMAND …`, under watch.

Secrets are set in the environment. Programs that are started, and connections to other machines, are refused and
written to the file `.watched` of the current folder, and so are modules that were imported from there.
"""

import os
import runpy
import sys
from pathlib import Path

SECRET = "s3cr3t0fTh1sMach1ne"
SECRETS = {"WANDB_API_KEY": SECRET * 2, "HF_TOKEN": f"hf_{SECRET}", "AWS_SECRET_ACCESS_KEY": SECRET}
REPORT = ".watched"
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")
CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
OWN = (["git"], ["uname"], [sys.executable, "-P"], [sys.executable, "-m", "qwlit"])
"""Beginnings of the commands that qwlit itself starts: for the commit of a checkout, the platform, the worker that
renders templates, and trials."""
HERE = ("localhost", "127.0.0.1", "::1", os.uname().nodename)


def _is_refused(event: str, details: tuple) -> bool:
    if event == "subprocess.Popen":
        return not any(list(details[1])[: len(own)] == own for own in OWN)
    if event == "socket.connect":
        address = details[1]
        return isinstance(address, tuple) and address[0] not in HERE
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        return details[0] not in HERE
    return event in PROGRAMS or event in CONNECTIONS


def _watch(event: str, details: tuple) -> None:
    if _is_refused(event, details):
        with REPORT_FILE.open("a") as report:
            report.write(f"{event} {details[:2]!r}\n")
        raise PermissionError(f"{event} is refused")


def _imported_from(folder: Path) -> list[str]:
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file and Path(file).is_relative_to(folder)]


if __name__ == "__main__":
    os.environ |= SECRETS
    folder = Path.cwd()
    REPORT_FILE = folder / REPORT
    sys.addaudithook(_watch)
    sys.argv[0] = "qwlit"
    try:
        runpy.run_module("qwlit", run_name="__main__", alter_sys=True)
    finally:
        if found := _imported_from(folder):
            with REPORT_FILE.open("a") as report:
                report.write(f"imported {found}\n")
