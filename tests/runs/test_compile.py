"""`hardware.compile=true` from the command line."""

import json
from shutil import which

import pytest

from tests.runs.runs import losses, qwlit, qwlit_process, train

WORDS = ["experiment=demo", "train.max_steps=4", "dropout=none", "data.exact_match=4", "data.packing=false"]


@pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")
def test_compiled_and_sharded_layers_train_as_one_plain_process_does_and_answer_prompts(tmp_path):
    plain = train([*WORDS, "run.name=plain"], tmp_path)
    sharded = ["hardware.compile=true", "hardware.strategy=fsdp", "hardware.devices=2"]
    compiled = train([*WORDS, *sharded, "run.name=compiled"], tmp_path, qwlit_process)
    assert [loss for _, loss in losses(compiled)] == pytest.approx([loss for _, loss in losses(plain)], rel=1e-5)
    said = [json.loads((run / "manifest.json").read_text())["compiled"] for run in (plain, compiled)]
    assert said == [False, True]
    assert (compiled / "samples.jsonl").read_text().count("\n") == 4


def test_what_cannot_be_one_graph_is_refused_in_one_line(tmp_path):
    for words, said in [
        (["model=demo"], "sdpa attention is computed one packed sample at a time"),
        (
            ["data.packing=false", "hardware.activation_checkpointing=offload"],
            "hardware.activation_checkpointing=offload",
        ),
        (["data.packing=false", "recipe=lora", "adapter.use_dora=true"], "adapter.use_dora=true"),
        (["data.packing=false", "determinism=strict"], "determinism=strict"),
    ]:
        done = qwlit(["train", "experiment=demo", "hardware=cpu", "hardware.compile=true", *words], tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
