"""hardware.precision=16-mixed: float16 with a loss scale, the true norm, skipped overflows."""

import pytest
import torch

from qwlit.model.head import linear_cross_entropy
from qwlit.model.loss_model import LossModel, LossOutput
from qwlit.run import modules
from qwlit.training.loss_scale import LossScale
from tests.runs.runs import TINY, assert_same_run, losses, qwlit, rows, summary, train

RUN = ["train.max_steps=6", "checkpoint.every_steps=2", "dropout=none", "data.exact_match=0", "data.val_path=null"]
HALF = [*RUN, "hardware.precision=16-mixed"]


def test_losses_and_norms_are_those_of_float32_but_for_rounding(tmp_path):
    full = train([*RUN, "run.name=full"], tmp_path)
    half = train([*HALF, "run.name=half"], tmp_path)
    for (step, a), (_, b) in zip(losses(full), losses(half), strict=True):
        assert b == pytest.approx(a, rel=2e-3), step
    norms = [[row["optim/grad_norm"] for row in rows(run) if "optim/grad_norm" in row] for run in (full, half)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)
    assert summary(half)["skipped_steps"] == 0


def test_an_overflow_is_skipped_and_halves_the_scale_and_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(modules, "LossScale", lambda: LossScale(2.0**30))
    run = train([*HALF, "train.max_steps=25", "run.name=high", "optim.lr=3e-3"], tmp_path)
    done = summary(run)
    assert done["status"] == "done"
    skips = [event for event in rows(run, "events.jsonl") if event["event"] == "skip"]
    assert 3 < len(skips) == done["skipped_steps"] < 20
    assert {skip["reason"] for skip in skips} == {"float16 overflow; the loss scale is halved"}
    assert done["train_loss_last"] < done["train_loss_first"] - 0.2


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale(tmp_path, monkeypatch):
    forward = LossModel.forward

    def spoiled(self, micro):
        out = forward(self, micro)
        return LossOutput(out.loss_sum * float("inf"), out.num_correct)

    monkeypatch.setattr(LossModel, "forward", spoiled)
    done = qwlit(["train", *TINY, *HALF, "run.name=spoiled"], tmp_path)
    assert done.returncode == 3, done.stderr
    assert "not finite 3 times in a row" in done.stderr


def test_a_run_cut_off_goes_on_to_the_same_bits_with_its_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(modules, "LossScale", lambda: LossScale(2.0**28))
    whole = train([*HALF, "train.max_steps=20", "run.name=whole"], tmp_path)
    forward, calls = LossModel.forward, []

    def breaks(self, micro):
        calls.append(len(micro.sample_ids))
        if sum(calls) > 16 * 11:
            raise torch.OutOfMemoryError("cut off")
        return forward(self, micro)

    monkeypatch.setattr(LossModel, "forward", breaks)
    words = [*HALF, "train.max_steps=20", "run.name=cut"]
    assert qwlit(["train", *TINY, *words], tmp_path).returncode == 2
    monkeypatch.setattr(LossModel, "forward", forward)
    # What a run begins with must not matter when it goes on.
    monkeypatch.setattr(modules, "LossScale", lambda: LossScale(4.0))
    cut = train(words, tmp_path)
    assert summary(cut)["resumed_from"] == 10
    assert_same_run(whole, cut)


def test_float16_trains_a_lora_adapter(tmp_path):
    run = train([*HALF, "recipe=lora", "train.max_steps=12", "optim.lr=1e-2", "run.name=lora"], tmp_path)
    assert summary(run)["train_loss_last"] < summary(run)["train_loss_first"]


def test_the_head_takes_float16():
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (7,))
    loss, _ = linear_cross_entropy(hidden, weight, targets, count_correct=False)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(hidden.float() @ weight.half().float().T, targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert hidden.grad.dtype == torch.float16 and weight.grad.dtype == torch.float32
