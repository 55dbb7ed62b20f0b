"""Activation checkpointing, and running out of memory, from the command line."""

import pytest
import torch

from qwlit.model.loss_model import LossModel
from tests.runs.runs import TINY, assert_same_run, qwlit, rows, summary, train

RUN = ["train.max_steps=4", "checkpoint.every_steps=2", "dropout=pretrain", "data.exact_match=0", "data.val_path=null"]

LEVEL = "hardware.activation_checkpointing"


def test_every_level_trains_to_the_same_bits(tmp_path):
    runs = [
        train([*RUN, f"hardware.activation_checkpointing={p}", f"run.name={p}"], tmp_path)
        for p in ("none", "selective", "full")
    ]
    offload = train([*RUN, "hardware.activation_checkpointing=offload", "run.name=offload", "recipe=lora"], tmp_path)
    assert summary(offload)["status"] == "done"
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


@pytest.mark.parametrize(
    ("words", "tries"),
    [
        (
            [],
            " · ".join(
                [*(f"{LEVEL}={level}" for level in ("selective", "full", "offload")), "hardware.micro_batch_size=4"]
            ),
        ),
        (
            ["hardware.activation_checkpointing=full", "hardware.micro_batch_size=1"],
            "hardware.activation_checkpointing=offload.",
        ),
        (
            [
                "hardware.activation_checkpointing=offload",
                "hardware.micro_batch_size=null",
                "hardware.micro_batch_tokens=4096",
            ],
            "hardware.micro_batch_tokens=2048.",
        ),
        (
            ["hardware.activation_checkpointing=offload", "hardware.micro_batch_size=1"],
            "recipe=lora, or a larger device",
        ),
    ],
)
def test_out_of_memory_says_what_holds_it_and_what_to_try_and_loses_nothing(words, tries, tmp_path, monkeypatch):
    forward, calls = LossModel.forward, []

    def fails_in_the_third_step(self, micro):
        calls.append(len(micro.sample_ids))
        if sum(calls) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore lines")
        return forward(self, micro)

    monkeypatch.setattr(LossModel, "forward", fails_in_the_third_step)
    done = qwlit(["train", *TINY, *RUN, "run.name=small", *words], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "out of memory in step 3 on CPU: " in done.stderr
    for holder in ("weights", "gradients", "optimizer", "activations"):
        assert holder in done.stderr
    assert f"Try in this order: {tries}" in done.stderr
    run = tmp_path / "runs" / "small"
    assert summary(run)["status"] == "failed"
    assert (run / "checkpoints" / "last").resolve().name == "step-000002"
    monkeypatch.undo()
    again = qwlit(["train", *TINY, *RUN, "run.name=small", *words, "hardware.activation_checkpointing=full"], tmp_path)
    assert again.returncode == 0, again.stderr
    assert summary(run)["resumed_from"] == 2 and rows(run)[-1]["step"] == 4
