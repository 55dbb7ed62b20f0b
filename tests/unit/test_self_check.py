"""The self-check of CUDA's kernels, run on CPU: it passes, and finds each planted fault.

tests/parity/test_cuda.py runs it on a GPU.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.model import attention, head
from qwlit.model.families import FAMILIES
from qwlit.optim import kinds, optimizers
from qwlit.optim.optimizers import set_clip_and_skip
from qwlit.planning.setup import resolve_setup
from qwlit.run.callbacks import _self_check
from qwlit.training import kernel_checks, self_check
from qwlit.training.kernel_checks import Place
from qwlit.training.self_check import LIMITS, check_once, checks_for, run_checks

CPU = Place(torch.device("cpu"), torch.float32, "sdpa", "qwen3")
USED = {"attention_dropout": True, "fused_adamw": True}
ALL = ["sdpa attention", "the head", "the last layer", "sdpa attention with dropout", "AdamW's skipped step"]


@pytest.mark.parametrize("place", [CPU, replace(CPU, attention="eager", model_type="qwen2")], ids=["sdpa", "eager"])
def test_every_check_passes_with_a_wide_margin_and_leaves_the_generator_as_it_was(place: Place) -> None:
    before = torch.get_rng_state()
    deviations = [check.deviation(place) for check in checks_for(place, **USED)]
    assert all(deviation < LIMITS[place.dtype] / 100 for deviation in deviations), deviations
    assert len(deviations) == len(ALL) and torch.equal(torch.get_rng_state(), before)


def test_in_bfloat16_rounding_stays_below_half_the_limit() -> None:
    place = replace(CPU, dtype=torch.bfloat16)
    deviations = [check.deviation(place) for check in checks_for(place, **USED)]
    assert all(deviation < LIMITS[place.dtype] / 2 for deviation in deviations), deviations


def wrong_scale(patch: pytest.MonkeyPatch) -> None:
    sdpa = attention._sdpa
    patch.setattr(attention, "_sdpa", lambda q, k, v, scaling, dropout: sdpa(q, k, v, 1.1 * scaling, dropout))


def undropped_scale(patch: pytest.MonkeyPatch) -> None:
    sdpa = attention._sdpa
    patch.setattr(attention, "_sdpa", lambda *args: sdpa(*args) * (1 - args[4]))


def forgotten_dropout(patch: pytest.MonkeyPatch) -> None:
    sdpa = attention._sdpa
    patch.setattr(attention, "_sdpa", lambda q, k, v, scaling, dropout: sdpa(q, k, v, scaling, 0.0))


def another_mask_in_the_backward_pass(patch: pytest.MonkeyPatch) -> None:
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weights: torch.Tensor, p: float) -> torch.Tensor:
            ctx.p = p
            return F.dropout(weights, p)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return F.dropout(grads[0], ctx.p), None

    def eager(q: Any, k: Any, v: Any, scaling: float, dropout: float) -> torch.Tensor:
        k, v = attention._repeat_key_value_heads(q, k, v)
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT * scaling).masked_fill(future, float("-inf")).softmax(-1)
        return Dropped.apply(weights, dropout) @ v  # type: ignore[no-any-return, no-untyped-call]

    patch.setattr(attention, "_sdpa", eager)


def a_row_lost_in_the_head(patch: pytest.MonkeyPatch) -> None:
    chunks = head._chunks
    patch.setattr(head, "_chunks", lambda rows, *rest: chunks(rows - 1, *rest))


def a_chunk_of_the_weight_gradient_lost_in_the_head(patch: pytest.MonkeyPatch) -> None:
    add = head._add_product
    patch.setattr(head, "_add_product", lambda total, *rest: add(None, *rest))


def positions_of_the_last_layer_off_by_one(patch: pytest.MonkeyPatch) -> None:
    family = type(FAMILIES["qwen3"])
    right = family.forward_label_positions

    def wrong(self: Any, layer: Any, states: Any, label_positions: Any, **kwargs: Any) -> Any:
        return right(self, layer, states, label_positions + 1, **kwargs)

    patch.setattr(family, "forward_label_positions", wrong)


class Deaf(torch.optim.AdamW):
    def step(self, *args: Any) -> Any:
        self.found_inf = None
        return super().step(*args)


def an_optimizer_that_ignores_found_inf(patch: pytest.MonkeyPatch) -> None:
    def adamw(groups: Any, config: Any) -> torch.optim.Optimizer:
        return Deaf(map(kinds.torch_group, groups), betas=config.betas, eps=config.eps, fused=True)

    patch.setitem(optimizers.OPTIMIZERS, "adamw", replace(kinds.OPTIMIZERS["adamw"], build=adamw))


def an_optimizer_that_does_not_clip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        kernel_checks,
        "set_clip_and_skip",
        lambda optimizer, norm, limit, *rest: set_clip_and_skip(optimizer, norm, None, *rest),
    )


@pytest.mark.parametrize(
    ("fault", "subject", "remedy"),
    [
        (wrong_scale, "sdpa attention", "model.attention=eager"),
        (undropped_scale, "sdpa attention with dropout", "model.attention=eager"),
        (forgotten_dropout, "sdpa attention with dropout", "model.attention=eager"),
        (another_mask_in_the_backward_pass, "sdpa attention with dropout", "model.attention=eager"),
        (a_row_lost_in_the_head, "the head", "hardware.accelerator=cpu"),
        (a_chunk_of_the_weight_gradient_lost_in_the_head, "the head", "hardware.accelerator=cpu"),
        (positions_of_the_last_layer_off_by_one, "the last layer", "hardware.accelerator=cpu"),
        (an_optimizer_that_ignores_found_inf, "AdamW's skipped step", "optim=paged_adamw"),
        (an_optimizer_that_does_not_clip, "AdamW's skipped step", "optim=paged_adamw"),
    ],
)
def test_a_planted_fault_is_found_in_one_line_with_the_setting_that_avoids_it(
    fault: Any, subject: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(ConfigError) as found:
        run_checks(checks_for(CPU, **USED), CPU, "A device")
    assert str(found.value).startswith(f"self-check: {subject} on A device deviates") and "\n" not in str(found.value)
    assert str(found.value).endswith(f"set {remedy}") and found.value.exit_code == 2


def test_a_kernel_that_fails_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*args: Any) -> torch.Tensor:
        raise NotImplementedError("no kernel image\nand more")

    monkeypatch.setattr(attention, "_varlen", no_kernel)
    place = replace(CPU, attention="varlen")
    with pytest.raises(
        ConfigError, match=r"varlen attention fails on CPU \(no kernel image\); set model.attention=sdpa"
    ):
        run_checks(checks_for(place, **USED), place, "CPU")


@pytest.mark.parametrize(
    ("dtype", "remedy"), [(torch.bfloat16, "hardware.precision=32-true"), (torch.float32, "hardware.accelerator=cpu")]
)
def test_in_half_precision_float32_is_the_heads_remedy(dtype: torch.dtype, remedy: str) -> None:
    checks = checks_for(replace(CPU, dtype=dtype), attention_dropout=False, fused_adamw=False)
    assert {check.subject: check.remedy for check in checks}["the head"] == remedy
    assert len(checks) == 3


def test_what_has_passed_is_not_checked_again_until_something_changes(tmp_path, monkeypatch) -> None:
    file, ran = tmp_path / "store" / "self-check.json", []
    for name in ("attention", "attention_dropout", "head", "last_layer", "optimizer"):
        monkeypatch.setattr(kernel_checks, name, lambda place, name=name: ran.append(name) or 0.0)

    def start(place: Place = CPU, device: str = "A", writes: bool = True, **used: bool) -> list[str]:
        ran.clear()
        check_once(place, device, file, writes=writes, **USED | used)
        return sorted(ran)

    assert len(start(writes=False)) == len(ALL)
    assert start(attention_dropout=False) == ["attention", "head", "last_layer", "optimizer"]
    assert start() == ["attention_dropout"]
    assert start() == []
    assert len(start(device="B")) == len(start(replace(CPU, dtype=torch.bfloat16))) == len(ALL)
    monkeypatch.setattr(self_check, "code_fingerprint", lambda: "other code")
    assert len(start()) == len(ALL)
    file.write_text("{", encoding="utf-8")
    assert len(start()) == len(ALL)
    assert json.loads(file.read_text())


@pytest.mark.parametrize(
    ("words", "subjects", "kernel"),
    [
        ([], [*ALL], "varlen"),
        (["dropout=none", "optim=adamw_8bit"], ALL[:3], "varlen"),
        (["recipe=lora", "hardware.precision=16-mixed", "dropout.attention=0.1"], [*ALL], "sdpa"),
    ],
)
def test_a_run_on_cuda_checks_what_it_uses_before_its_first_step(
    words: list[str], subjects: list[str], kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = resolve_setup(compose(["hardware=a100", f"run.root={tmp_path}", *words]), trust_profile=True)
    plan = SimpleNamespace(setup=setup, machine=setup.machine, execution=setup.execution)
    ran: list[str] = []
    monkeypatch.setattr(self_check, "run_checks", lambda checks, *_: ran.extend(check.subject for check in checks))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), is_global_zero=True)
    _self_check(SimpleNamespace(config=setup.config, plan=plan)).setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert sorted(ran) == sorted(subject.replace("sdpa", kernel) for subject in subjects)
    (file,) = tmp_path.rglob("*.json")
    assert "NVIDIA A100" in file.read_text()


def test_a_file_that_cannot_be_written_or_read_does_not_end_the_run(tmp_path) -> None:
    (tmp_path / "store").write_text("no folder")
    check_once(CPU, "A", tmp_path / "store" / "self-check.json", writes=True, **USED)
