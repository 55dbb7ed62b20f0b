"""What a training writes to metrics.jsonl about its parameter groups."""

import pytest

from tests.runs.runs import DEMO, TINY, qwlit_process, rows, train

MEASURED = ("optim/grad_norm/", "optim/update_ratio/", "model/activation_norm")


def test_two_replicas_and_two_shards_measure_what_one_process_measures(tmp_path):
    words = [*TINY, f"data.path={DEMO / 'val.jsonl'}", "data.val_fraction=0", "data.exact_match=0", "dropout=none"]
    words += ["train.max_steps=3", "train.max_grad_norm=1e-3", "checkpoint.each_epoch=false"]
    layouts = {"one": [], "ddp": ["hardware.devices=2"], "fsdp": ["hardware.devices=2", "hardware.strategy=fsdp"]}
    seen = {
        name: rows(train([*words, *layout, f"run.name={name}"], tmp_path, qwlit_process))
        for name, layout in layouts.items()
    }
    for one, other in [*zip(seen["one"], seen["ddp"], strict=True), *zip(seen["one"], seen["fsdp"], strict=True)]:
        names = [name for name in one if name.startswith(MEASURED)]
        assert {"optim/grad_norm/decay", "optim/update_ratio/no_decay", "model/activation_norm"} <= set(names)
        # The shards sample other elements.
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=0.02)
        assert one["optim/clipped_share"] == other["optim/clipped_share"] == 1
        parts = [one[name] ** 2 for name in names if "grad_norm" in name]
        assert sum(parts) ** 0.5 == pytest.approx(one["optim/grad_norm"], rel=1e-5)
