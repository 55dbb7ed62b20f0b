"""Fixtures that several folders of tests share."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from filelock import FileLock

from tests.real_tokenizer import build_real_tokenizer, real_backend

# Tests send Ctrl-C to processes that they start: these would ignore it where pytest does (`pytest &` in a script).
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from family to a folder with its tokenizer, each built once for all test processes."""
    session = tmp_path_factory.getbasetemp()
    shared = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "tokenizers"
    shared.mkdir(exist_ok=True)

    @lru_cache
    def build(family: str) -> Path:
        with FileLock(shared / "lock"):
            backend = shared / "backend.json"
            if not backend.exists():
                backend.write_text(real_backend(), encoding="utf-8")
            folder = shared / family
            if not folder.exists():
                build_real_tokenizer(family, folder, backend.read_text(encoding="utf-8"))
            return folder

    return build


@pytest.fixture(autouse=True)
def _console_of_its_own():
    """A console that could not print to a full disk stays quiet: the next test of this process gets a new one."""
    yield
    if "qwlit.core.console" in sys.modules:
        sys.modules["qwlit.core.console"].console.cache_clear()
