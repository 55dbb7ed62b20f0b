"""An optimizer step of ours is what plain torch and transformers make of its definition."""

import copy
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import torch
import torch.nn.functional as F

from qwlit.data.batches import StepDataset, train_loader
from qwlit.data.step_plan import Limits
from qwlit.model.attention import register_attention
from qwlit.model.loss_model import LossModel
from qwlit.optim.config import OptimConfig, SchedulerConfig
from qwlit.optim.schedules import Schedule
from qwlit.training.module import CausalLMModule
from qwlit.training.trainer import build_trainer
from tests.invariance.worker import Ragged, machine, plan_of
from tests.tiny import tiny_causal_lm

STEPS, BATCH, LR, DECAY, CLIP = 5, 8, 1e-2, 0.1, 0.5
# Warm-up over two steps, then linearly down to nothing at step 5: by hand.
FACTORS = [0.5, 1.0, 1.0, 2 / 3, 1 / 3]


class Seen(lightning.Callback):
    def __init__(self) -> None:
        self.losses, self.norms, self.rates = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(module.outcome.loss_sum) / batch.num_supervised_tokens)
        self.norms.append(float(module.outcome.grad_norm))
        self.rates.append(module.outcome.lr)


def by_definition(model, samples, plan):
    """Mean loss over the step's supervised tokens, clipped, AdamW: with nothing of ours but which samples."""
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "norm" in n)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        total, count = 0.0, 0
        for index in plan.samples(step):
            ids, mask = (torch.from_numpy(a.astype("int64")) for a in samples.read([int(index)]))
            labels = torch.where(mask.bool(), ids, -100)
            logits = model(ids[None]).logits[0, :-1].float()
            total = total + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            count += int(mask[1:].sum())
        (total / count).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = LR * FACTORS[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    return losses, norms


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_five_steps_equal_plain_torch_in_loss_norm_rate_and_weights(family):
    reference = tiny_causal_lm(family)
    ours, samples, seen = copy.deepcopy(reference), Ragged(), Seen()
    ours.set_attn_implementation(register_attention())
    module = CausalLMModule(
        LossModel(ours, "sdpa"),
        optim=OptimConfig(lr=LR, weight_decay=DECAY, no_decay=("bias", "norm")),
        schedule=Schedule(SchedulerConfig(name="linear", warmup_steps=2), STEPS),
        max_grad_norm=CLIP,
        loss_scale=None,
        shard=None,
        seed=0,
    )
    plan = plan_of(samples, 1, Limits(max_samples=3), packing=True, batch=BATCH)
    trainer = build_trainer(machine("single", 1), total_steps=STEPS, callbacks=[seen], folder=Path())
    steps = StepDataset(samples, plan, 0, pad_id=0)
    trainer.fit(module, train_loader(steps, start_step=0, total_steps=STEPS, num_workers=0, pin_memory=False))
    losses, norms = by_definition(reference, samples, plan)
    assert min(norms) > CLIP, "clipping must matter, or nothing is shown"
    assert seen.losses == pytest.approx(losses, rel=2e-5)
    assert seen.norms == pytest.approx(norms, rel=1e-4)
    assert seen.rates == pytest.approx([LR * factor for factor in FACTORS])
    trained = dict(ours.named_parameters())
    for name, weight in reference.named_parameters():
        assert float((trained[name] - weight).detach().abs().max()) < 0.02 * LR, name
