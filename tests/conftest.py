"""Fixtures that several folders of tests share."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests.real_tokenizer import build_real_tokenizer


@pytest.fixture(scope="session")
def real_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from family to a folder with its tokenizer, each built once a session."""

    @lru_cache
    def build(family: str) -> Path:
        return build_real_tokenizer(family, tmp_path_factory.mktemp(family))

    return build
