"""The way to the hub: fast and clear when it is closed, and the cache behind it."""

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qwlit.core.errors import ConfigError
from qwlit.core.waiting import call_with_timeout
from qwlit.model import hub
from qwlit.model.config import FreezeConfig, ModelConfig
from qwlit.model.load import load_tokenizer
from tests.real_tokenizer import small_tokenizer
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


class StandIn:
    """Stands in for the package modelscope 1.40: its errors, and calls that are recorded instead of sent."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.cached = True
        api, download, errors = (ModuleType(name) for name in ("api", "snapshot_download", "errors"))
        for name in ("APIError", "NetworkError", "CacheNotFound"):
            setattr(errors, name, type(name, (Exception,), {}))
        for name in ("AuthenticationError", "PermissionDeniedError", "NotExistError", "ServerError"):
            setattr(errors, name, type(name, (errors.APIError,), {}))
        self.errors = errors

        def get_model(hub_id: str) -> None:
            if self.error is not None:
                raise self.error

        def snapshot_download(hub_id: str, **options: Any) -> str:
            self.calls.append((hub_id, options))
            if options.get("local_files_only") and not self.cached:
                raise errors.CacheNotFound
            return str(folder)

        api.HubApi = lambda: SimpleNamespace(get_model=get_model)  # type: ignore[attr-defined]
        download.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        for module in (api, download, errors):
            monkeypatch.setitem(sys.modules, f"modelscope.hub.{module.__name__}", module)


MODELSCOPE = ModelConfig(hub_id=HUB, hub="modelscope")


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    folder = save_folder(tiny_causal_lm(), tmp_path / "snapshot")
    small_tokenizer("qwen3").save_pretrained(folder)
    return StandIn(folder, monkeypatch)


def test_a_model_and_its_tokenizer_are_fetched_from_modelscope(modelscope: StandIn) -> None:
    loaded = load_causal_lm(MODELSCOPE)
    assert torch.equal(loaded.lm_head.weight, tiny_causal_lm().lm_head.weight)
    assert load_tokenizer(MODELSCOPE).chat_template == small_tokenizer("qwen3").chat_template
    elsewhere = ModelConfig(path="unused", tokenizer="owner/tokenizer", hub="modelscope")
    assert len(load_tokenizer(elsewhere)) == 700
    fetched = [(HUB, {"allow_patterns": hub.MODEL_FILES}), (HUB, {"allow_patterns": hub.TOKENIZER_FILES})]
    assert modelscope.calls[0] == fetched[0] and fetched[1] in modelscope.calls
    assert modelscope.calls[-1] == ("owner/tokenizer", {"allow_patterns": hub.TOKENIZER_FILES})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("NotExistError", f"{HUB} is neither a folder here nor on ModelScope, or private"),
        ("PermissionDeniedError", f"{HUB} needs access .*modelscope login"),
        ("ServerError", rf"{HUB} could not be fetched \(ModelScope answered: no\); set model.path=FOLDER"),
        ("NetworkError", rf"{HUB} could not be fetched \(ModelScope cannot be reached: no\); set model.path=FOLDER"),
    ],
)
def test_what_modelscope_refuses_is_said_in_one_line(error: str, said: str, modelscope: StandIn) -> None:
    modelscope.error, modelscope.cached = getattr(modelscope.errors, error)("no\nmore"), False
    with pytest.raises(ConfigError, match=said) as raised:
        load_tokenizer(MODELSCOPE)
    assert "\n" not in str(raised.value)


def test_without_a_network_what_modelscope_has_cached_is_taken(modelscope: StandIn) -> None:
    modelscope.error = modelscope.errors.NetworkError("no")
    assert len(load_tokenizer(MODELSCOPE)) == 700
    assert modelscope.calls == [(HUB, {"allow_patterns": hub.TOKENIZER_FILES, "local_files_only": True})]


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match=r"^model.hub=modelscope needs a package .*pip install modelscope$"):
        load_tokenizer(MODELSCOPE)
