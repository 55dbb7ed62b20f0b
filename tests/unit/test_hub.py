"""The way to the hub: fast and clear when it is closed, and the cache behind it."""

import threading
from pathlib import Path

import pytest
import torch

from qwlit.core.errors import ConfigError
from qwlit.core.waiting import call_with_timeout
from qwlit.model import hub
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.load import load_tokenizer
from tests.tiny import load_causal_lm, save_folder, tiny_causal_lm

HUB = "Qwen/Qwen3-0.6B"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Point the hub's client at a closed port and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_without_a_network_the_hub_fails_in_one_line_and_silently(part: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"{HUB} could not be fetched.*model.path=FOLDER") as raised:
        if part == "model":
            load_causal_lm(ModelConfig(hub_id=HUB), seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32)
        else:
            load_tokenizer(ModelConfig(hub_id=HUB))
    assert "\n" not in str(raised.value)
    assert "experiment=demo" in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer_is_given_up() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        call_with_timeout(0.05, never.wait)
    never.set()


@pytest.mark.parametrize(
    ("name", "is_one"), [("Qwen/Qwen3-0.6B", True), ("./Qwen3", False), ("../a", False), ("/a/b", False), ("a", False)]
)
def test_hub_ids_are_told_from_paths(name: str, is_one: bool) -> None:
    assert hub.looks_like_hub_id(name) == is_one


def test_without_a_network_a_cached_copy_is_taken(cache: Path) -> None:
    repository = cache / "models--Qwen--Qwen3-0.6B"
    saved = tiny_causal_lm()
    save_folder(saved, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    loaded = load_causal_lm(ModelConfig(hub_id=HUB), seed=0, freeze=FreezeConfig(), frozen_dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
