"""hardware.strategy=fsdp: the same training with weights, gradients and moments cut over the ranks."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwlit.training.checkpointing.checkpoint import read_weights
from tests.runs.runs import (
    DEMO,
    ENVIRONMENT,
    TINY,
    children,
    free_port,
    interpreter,
    losses,
    qwlit,
    qwlit_process,
    rows,
    started,
    succeed_together,
    summary,
    tasks_of_srun,
    train,
    warm_command,
    warm_pid,
)
from tests.tiny import TINY as SHAPE
from tests.tiny import save_folder, tiny_causal_lm

RUN = [
    *("data.exact_match=0", "dropout=none", "train.max_steps=6", "checkpoint.every_steps=2"),
    *("validation.every_steps=3", "hardware.micro_batch_size=3"),
]


def sharded(devices: int = 2) -> list[str]:
    return [f"hardware.devices={devices}", "hardware.strategy=fsdp"]


def validations(run: Path) -> list[float]:
    return [row["val/loss"] for row in rows(run) if "val/loss" in row]


def assert_same_training(one: Path, two: Path) -> None:
    assert losses(two) == [(step, pytest.approx(loss, rel=2e-5)) for step, loss in losses(one)]
    assert validations(two) == pytest.approx(validations(one), rel=2e-5)
    left, right = (dict(read_weights(run / "checkpoints" / "last")) for run in (one, two))
    assert left.keys() == right.keys()
    assert all((left[name] - right[name]).abs().max() < 1e-4 for name in left)


@pytest.mark.parametrize("recipe", ["full_sft", "lora"])
def test_two_shards_train_the_model_of_one_process_and_export_it(recipe, tmp_path):
    words = [*RUN, f"recipe={recipe}", "dropout=none", "data.exact_match=4"]
    one = train([*words, "run.name=one"], tmp_path)
    two = train([*words, "run.name=two", *sharded()], tmp_path, qwlit_process)
    assert_same_training(one, two)
    files = {f"{stem}-0000{rank}-of-00002.safetensors" for stem in ("model", "optimizer") for rank in (1, 2)}
    manifest = json.loads((two / "checkpoints" / "last" / "MANIFEST.json").read_text())["files"]
    assert manifest.keys() == files | {"training_state.pt"}
    (name,) = {file.name for file in (one / "export").glob("*.safetensors")}
    exported = [load_file(run / "export" / name) for run in (one, two)]
    assert exported[0].keys() == exported[1].keys()
    assert all((exported[0][key] - exported[1][key]).abs().max() < 1e-4 for key in exported[0])
    assert len(rows(two, "samples.jsonl")) == 4


def test_a_run_goes_on_from_two_shards_to_four_to_two_replicas_to_one_process(tmp_path):
    long = [*RUN, "train.max_steps=150", "validation.every_steps=null", "checkpoint.every_steps=null"]
    whole = train([*long, "run.name=whole"], tmp_path)
    run = tmp_path / "runs" / "cut"
    words = [*long, "run.name=cut"]
    on_host = "hardware.offload_optimizer=true"
    for machine, logged in (([*sharded(2), on_host], 4), (sharded(4), 8), (["hardware.devices=2"], 12)):
        process = started([*words, *machine], run, logged=logged)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 75, said
    train([*words, on_host], tmp_path)
    resumed = [row["step"] for row in rows(run, "events.jsonl") if row["event"] == "resumed"]
    assert len(resumed) == 3 and resumed == sorted(set(resumed))
    assert_same_training(whole, run)


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen2", False)])
@pytest.mark.parametrize("recipe", ["full_sft", "lora"])
def test_a_folder_is_read_row_by_row_into_memory_that_was_full_of_nan(family, tied, recipe, tmp_path):
    folder = save_folder(tiny_causal_lm(family, tied=tied, spread=1.0), tmp_path / "base")
    data = tmp_path / "tokens.jsonl"
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, SHAPE.vocab_size, (12,), generator=generator).tolist() for _ in range(48)]
    data.write_text("\n".join(json.dumps({"input_ids": row, "labels": row}) for row in ids))
    words = [f"model.path={folder}", f"data.path={data}", "hardware=cpu", f"recipe={recipe}", *RUN]
    # Deterministic mode has torch fill all memory that nobody has written with NaN.
    words += [
        "logging.every_steps=1",
        "data.val_path=null",
        "optim.lr=1e-3",
        "preflight.allow=[full_lr]",
        "dropout=none",
        "determinism=reproducible",
    ]
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for run, machine in zip(runs, ([], sharded()), strict=True):
        done = qwlit_process(["train", *words, f"run.name={run.name}", *machine], tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_training(*runs)
    assert summary(runs[1])["skipped_steps"] == 0
    traces = [rows(run, "trace.jsonl") for run in runs]
    assert [row["samples"] for row in traces[0]] == [row["samples"] for row in traces[1]]


@pytest.mark.parametrize("recipe", ["full_sft", "lora"])
def test_shards_start_from_an_adapter_as_one_process_does(recipe, tmp_path):
    folder = save_folder(tiny_causal_lm("qwen3", tied=False, spread=1.0), tmp_path / "base")
    data = tmp_path / "tokens.jsonl"
    data.write_text(
        "\n".join(json.dumps({"input_ids": [i, 7, i + 1, i], "labels": [i, 7, i + 1, i]}) for i in range(48))
    )
    words = [f"data.path={data}", "hardware=cpu", *RUN, "logging.every_steps=1", "data.val_path=null", "dropout=none"]
    words += ["optim.lr=1e-2", "preflight.allow=[full_lr]"]
    done = qwlit_process(["train", *words, f"model.path={folder}", "recipe=lora", "run.name=first"], tmp_path)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "runs" / "first" / "export"
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for run, machine in zip(runs, ([], sharded()), strict=True):
        asked = ["train", *words, f"model.path={adapter}", f"recipe={recipe}", f"run.name={run.name}", *machine]
        done = qwlit_process(asked, tmp_path)
        assert done.returncode == 0, done.stderr
    assert_same_training(*runs)
    # The first step has the same samples: what the adapter has learned shows in its loss.
    assert losses(runs[0])[0][1] < losses(tmp_path / "runs" / "first")[0][1] - 0.1


def test_a_damaged_folder_ends_all_ranks_in_one_line_each(tmp_path):
    folder = save_folder(tiny_causal_lm("qwen3", vocab_size=520), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    words = ["train", f"model.path={folder}", f"data.path={DEMO / 'val.jsonl'}", "hardware=cpu", *sharded()]
    done = qwlit_process([*words, "model.tokenizer=qwlit:demo/tokenizer", "run.name=a"], tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "config.json and weights disagree" in done.stderr


def test_what_only_another_rank_finds_wrong_ends_the_job_with_exit_code_2(tmp_path):
    model = tiny_causal_lm("qwen3", tied=False, vocab_size=520)
    model.model.norm.weight.data[-1] = float("nan")  # the second rank's half
    words = ["train", f"model.path={save_folder(model, tmp_path / 'base')}", f"data.path={DEMO / 'val.jsonl'}"]
    words += ["hardware=cpu", *sharded(), "model.tokenizer=qwlit:demo/tokenizer", "run.name=a"]
    done = qwlit_process(words, tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "model.norm.weight holds inf or NaN" in done.stderr
    assert summary(tmp_path / "runs" / "a")["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware.strategy=fsdp"], "hardware.strategy=fsdp shards over several devices, but one device is set"),
        ([*sharded(), "hardware.precision=16-mixed"], "hardware.strategy=fsdp has no loss scale for 16-mixed"),
    ],
)
def test_what_cannot_be_sharded_is_refused(words, said, tmp_path):
    done = qwlit(["train", *TINY, *words], tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_of_two_under_torchrun_train_what_one_process_trains(strategy, tmp_path):
    one = train([*RUN, "run.name=one"], tmp_path)
    port = free_port()
    words = ["train", *TINY, *RUN, "run.name=nodes", "hardware.devices=2", "hardware.num_nodes=2"]
    nodes = [
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"),
            *(f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *("--no-python", interpreter(), "-m", "qwlit"),
            *(*words, f"hardware.strategy={strategy}"),
        ]
        for node in range(2)
    ]
    succeed_together([(node, ENVIRONMENT) for node in nodes], tmp_path, timeout=200)
    assert_same_training(one, tmp_path / "runs" / "nodes")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_ends_the_job_soon_in_one_line_that_names_it(strategy, tmp_path):
    words = [*RUN, "train.max_steps=2000", "run.name=killed", "hardware.devices=2", f"hardware.strategy={strategy}"]
    process = started(words, tmp_path / "runs" / "killed", logged=5, warm=False)
    (child, *_) = children(process.pid)
    os.kill(child, signal.SIGKILL)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1, said
    assert "lost another rank: rank 1 ended with signal 9 (out of memory?)" in said and "Traceback" not in said
    assert summary(tmp_path / "runs" / "killed")["status"] == "failed"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_stopped_is_named_by_the_one_that_waits_for_it(strategy, tmp_path):
    words = [*RUN, "train.max_steps=2000", "run.name=a", "hardware.devices=2", f"hardware.strategy={strategy}"]
    process = started([*words, "hardware.timeout_seconds=8"], tmp_path / "runs" / "a", logged=5)
    (stand_in, *_) = children(warm_pid(process.pid))
    child = warm_pid(stand_in)
    os.kill(child, signal.SIGSTOP)
    said = process.communicate(timeout=90)[1]
    assert process.returncode == 1, said
    assert re.search(
        r"no progress for 8 s .*: rank 1 \(.*\) stopped sending heartbeats at step \d+, .*\.py:\d+", said
    ), said
    assert said.count("\n") == 1 and summary(tmp_path / "runs" / "a")["status"] == "failed"
    for _ in range(100):
        if not Path(f"/proc/{child}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the stopped rank outlived the job")


HANGS = """
import os, threading, time
def hang():
    time.sleep(1)
    from qwlit.data.batches import StepDataset
    plain, began = StepDataset.__getitem__, time.monotonic()
    def slow(self, step):
        while step > 20:
            time.sleep(1)
        return plain(self, step)
    StepDataset.__getitem__ = slow
if os.environ.get("LOCAL_RANK") == "1":
    threading.Thread(target=hang, daemon=True).start()
"""


def test_a_rank_that_hangs_is_named_with_the_line_in_which_it_stands(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    words = [*RUN, "train.max_steps=2000", "run.name=a", "hardware.devices=2", "hardware.timeout_seconds=20"]
    done = qwlit_process(["train", *TINY, *words], tmp_path, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r": rank 1 \(.*\) is at step 2\d, .*sitecustomize.py:9 \(slow\)", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [
        ("ddp", {"allreduce_"}),
        ("fsdp", {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"}),
    ],
)
def test_between_log_points_ranks_exchange_gradients_loss_and_norm_and_one_word(strategy, allowed, tmp_path):
    words = [*RUN, "train.max_steps=8", "logging.every_steps=100", "checkpoint.every_steps=100", "profile.steps=[3,6]"]
    words += ["validation.every_steps=null", "run.name=a", "hardware.devices=2", f"hardware.strategy={strategy}"]
    run = train(words, tmp_path, qwlit_process)
    events = json.loads((run / "profile" / "steps-3-6.json").read_text())["traceEvents"]
    seen = Counter(e["name"].removeprefix("c10d::") for e in events if str(e.get("name")).startswith("c10d::"))
    assert set(seen) == allowed, seen
    if strategy == "ddp":
        # Four times one bucket of gradients, and loss and norm; three times the word that a signal would set.
        assert seen["allreduce_"] == 4 + 4 + 3, seen


@pytest.mark.parametrize(
    ("words", "levels", "tolerance"),
    [
        # Muon orthogonalizes in bfloat16, whose rounding depends on where rows are cut.
        (["recipe=full_sft", "optim=muon"], ["hardware.activation_checkpointing=offload"], 2e-4),
        (["recipe=freeze", "optim=sgd", "optim.lr=0.1"], ["hardware.offload_optimizer=true"], 2e-5),
        (
            ["recipe=lora", "adapter.use_dora=true", "optim.lora_plus_ratio=4.0"],
            ["hardware.offload_optimizer=true", "hardware.activation_checkpointing=full"],
            2e-5,
        ),
    ],
    ids=["muon", "freeze-sgd", "dora"],
)
def test_every_optimizer_freezing_and_adapter_that_can_be_sharded_trains_what_one_process_trains(
    words, levels, tolerance, tmp_path
):
    words = [*RUN, *words, "dropout=none"]
    one = train([*words, "run.name=one"], tmp_path)
    for name, machine in (("ddp", ["hardware.devices=2"]), ("fsdp", [*sharded(), *levels])):
        two = train([*words, f"run.name={name}", *machine], tmp_path, qwlit_process)
        assert losses(two) == [(step, pytest.approx(loss, rel=tolerance)) for step, loss in losses(one)]
        assert validations(two) == pytest.approx(validations(one), rel=tolerance)


def test_8_bit_moments_of_shard_slices_train_like_whole_ones_and_resume_to_the_same_bits_on_as_many_devices(tmp_path):
    # Half of a matrix of the feed-forward block has 8192 elements: bitsandbytes keeps 8 bits from 4096 on.
    words = [*RUN, "train.max_steps=60", "validation.every_steps=null", "checkpoint.every_steps=null"]
    words += ["optim=adamw_8bit", "model.architecture.intermediate_size=256"]
    one = train([*words, "run.name=one"], tmp_path)
    whole = train([*words, "run.name=whole", *sharded()], tmp_path, qwlit_process)
    run = tmp_path / "runs" / "cut"
    process = started([*words, "run.name=cut", *sharded()], run, logged=4)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    moments = load_file(run / "checkpoints" / "last" / "optimizer-00002-of-00002.safetensors")
    assert any(name.startswith("state1.") and tensor.dtype == torch.uint8 for name, tensor in moments.items())
    refused = qwlit(["train", *TINY, *words, "run.name=cut"], tmp_path)
    assert refused.returncode == 2 and "resume on fsdp on 2 devices" in refused.stderr
    assert refused.stderr.count("\n") == 1, refused.stderr
    train([*words, "run.name=cut", *sharded()], tmp_path, qwlit_process)
    assert losses(run)[-1][0] == 60
    weights = [dict(read_weights(each / "checkpoints" / "last")) for each in (whole, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # Blocks of other elements have other scales: the losses are near, not equal.
    assert losses(whole) == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in losses(one)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe=qlora"], "adapter.quantization=nf4 cannot be sharded"),
        (["recipe=lora", "optim=muon", "adapter.rank=1"], "optim.name=muon cannot shard adapters of rank 1 over 2"),
        (["optim=muon", "hardware.offload_optimizer=true"], "optim.name=muon cannot step on the host; set optim=adamw"),
    ],
)
def test_what_cannot_be_sharded_or_step_on_the_host_is_refused(words, said, tmp_path):
    done = qwlit(["train", *TINY, *words, *sharded()], tmp_path)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", ["full_sft", "lora", "freeze"])
def test_in_bf16_shards_compute_what_replicas_do(recipe, tmp_path):
    words = [*RUN, f"recipe={recipe}", "dropout=none", "hardware.precision=bf16-mixed", "hardware.devices=2"]
    ddp, fsdp = (
        train([*words, f"run.name={name}", f"hardware.strategy={name}"], tmp_path, qwlit_process)
        for name in ("ddp", "fsdp")
    )
    # Not to the bit: norm weights travel in bfloat16, and gradients are summed in another order.
    assert losses(fsdp) == [(step, pytest.approx(loss, rel=2e-4)) for step, loss in losses(ddp)]
    norms = [[row["optim/grad_norm"] for row in rows(run) if "optim/grad_norm" in row] for run in (ddp, fsdp)]
    assert norms[1] == pytest.approx(norms[0], rel=3e-3)


@pytest.mark.parametrize("job_name", ["train", "interactive"])
def test_tasks_of_srun_are_the_ranks_whatever_the_job_is_called(job_name, tmp_path):
    """Lightning takes a job called interactive, as salloc's are, for no Slurm job, and would start ranks of its own."""
    one = train([*RUN, "run.name=one"], tmp_path)
    words = warm_command(["train", *TINY, *RUN, "run.name=two", "hardware.devices=2"])
    succeed_together([(words, task) for task in tasks_of_srun(job_name)], tmp_path, timeout=100)
    assert_same_training(one, tmp_path / "runs" / "two")


def test_a_run_is_done_also_where_device_memory_is_too_small_to_answer_prompts(tmp_path, monkeypatch):
    from qwlit.run import finish

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finish, "_answer", out_of_memory)
    run = train([*RUN, "run.name=a", "data.exact_match=4"], tmp_path)
    assert summary(run)["status"] == "done" and (run / "export").is_dir()
    assert any("too little device memory" in row.get("message", "") for row in rows(run, "events.jsonl"))
