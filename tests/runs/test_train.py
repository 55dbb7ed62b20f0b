"""`train` end to end on a tiny model: what a run leaves behind, what it continues, and what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwlit.core.errors import ConfigError, Preempted, SignalExit
from qwlit.model.adapters import apply_adapter
from qwlit.model.config import AdapterConfig
from qwlit.model.presets import to_hf_config
from qwlit.run import begin
from tests.runs.runs import (
    DEMO,
    ENVIRONMENT,
    TINY,
    assert_same_run,
    command,
    losses,
    qwlit,
    qwlit_process,
    rows,
    started,
    summary,
    train,
    warm_command,
    weights,
)
from tests.tiny import save_folder, tiny_architecture, tiny_causal_lm


@pytest.fixture
def chat(tmp_path):
    """60 rows of the demo corpus."""
    lines = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def words(chat, name, *more):
    return [
        f"data.path={chat}",
        "data.val_fraction=0.2",
        "train.max_steps=10",
        "validation.every_steps=4",
        "checkpoint.every_steps=3",
        "dropout=pretrain",
        f"run.name={name}",
        *more,
    ]


def test_a_run_leaves_the_folder_that_scripts_rely_on(chat, tmp_path):
    with chat.open("a", encoding="utf-8") as file:
        file.write('{"messages": "nonsense"}\n')
    run = train(words(chat, "a"), tmp_path)
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "quarantine.jsonl", "summary.json"):
        assert (run / name).is_file()
    done = summary(run)
    assert (done["status"], done["steps"], done["resumed_from"], done["skipped_steps"]) == ("done", 10, None, 0)
    assert done["rows"] == {
        **{"read": 61, "accepted": 60, "too_long": 0, "quarantined": 1},
        **{"truncated": 0, "split": 0, "duplicates": 0},
    }
    assert done["train_loss_first"] == losses(run)[0][1] and done["train_loss_last"] == losses(run)[-1][1]
    assert [step for step, _ in losses(run)] == list(range(1, 11))
    validations = {row["step"]: row["val/loss"] for row in rows(run) if "val/loss" in row}
    # Every 4 steps, at the epoch's end (ceil(48 / 16) = 3 per epoch), and after the last step.
    assert {4, 8, 10} <= set(validations)
    assert done["val_loss_best"] == min(validations.values())
    best = json.loads((run / "checkpoints/best/MANIFEST.json").read_text())["step"]
    assert validations[best] == min(validations.values())
    assert (run / "checkpoints/last").resolve().name == "step-000010"
    (rejected,) = rows(run, "quarantine.jsonl")
    assert (rejected["file"], rejected["line"]) == (str(chat), 61)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["parameters"]["total"] == manifest["parameters"]["trainable"] > 0
    assert not {"environment", "env"} & manifest.keys()


def test_training_repeats_itself_bit_for_bit_and_from_its_own_config(chat, tmp_path):
    a = train(words(chat, "a"), tmp_path)
    b = train(words(chat, "b"), tmp_path)
    assert_same_run(a, b)
    done = qwlit(["train", f"config={a / 'config.yaml'}", "run.name=c"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(a, a.with_name("c"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "sigterm", "kill-9"])
def test_a_run_cut_off_goes_on_to_the_same_bits_with_dropout_on(number, chat, tmp_path):
    # A rhythm of logging that no checkpoint falls on: the sums since the last line must survive, too.
    long = ["train.max_steps=40", "logging.every_steps=7", "checkpoint.every_steps=3"]
    whole = train(words(chat, "whole", *long), tmp_path)
    cut = tmp_path / "runs" / "cut"
    process = started(words(chat, "cut", *long), cut, logged=3)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    codes = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == codes[number], said
    status = {signal.SIGINT: "interrupted", signal.SIGTERM: "preempted", signal.SIGKILL: "running"}
    assert summary(cut)["status"] == status[number]
    if number != signal.SIGKILL:
        assert "run the same command to resume" in said and "Traceback" not in said
    train(words(chat, "cut", *long), tmp_path)
    assert 0 < summary(cut)["resumed_from"] < 40
    assert_same_run(whole, cut)


@pytest.mark.parametrize(
    ("raised", "code", "status"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (SignalExit(Preempted("a signal")), 75, "preempted"),
        (ConfigError("a fault"), 2, "failed"),
    ],
)
def test_a_run_that_ends_before_its_first_step_has_a_true_status(raised, code, status, chat, tmp_path, monkeypatch):
    def end(*arguments):
        raise raised

    monkeypatch.setattr(begin, "_print_start", end)
    assert qwlit(["train", *TINY, *words(chat, "a")], tmp_path).returncode == code
    assert summary(tmp_path / "runs/a")["status"] == status


def test_a_finished_run_is_refused_until_told_to_overwrite(chat, tmp_path):
    run = train(words(chat, "a"), tmp_path)
    again = qwlit(["train", *TINY, *words(chat, "a")], tmp_path)
    assert again.returncode == 2
    assert "is finished" in again.stderr and "run.overwrite=true" in again.stderr
    assert again.stderr.count("\n") == 1
    before = (run / "manifest.json").stat().st_mtime_ns
    wrong = qwlit(["train", *TINY, *words(chat, "a", "run.overwrite=true", "data.val_path=nowhere.jsonl")], tmp_path)
    assert wrong.returncode == 2 and (run / "manifest.json").stat().st_mtime_ns == before, "bad input loses nothing"
    train(words(chat, "a", "run.overwrite=true"), tmp_path)
    assert (run / "manifest.json").stat().st_mtime_ns != before


@pytest.fixture
def unfinished(chat, tmp_path):
    run = train(words(chat, "a"), tmp_path)
    shutil.rmtree((run / "checkpoints/last").resolve())
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "running"}))
    return run


def test_other_mathematics_or_data_is_refused_with_the_difference(unfinished, chat, tmp_path):
    other = qwlit(["train", *TINY, *words(chat, "a", "optim.weight_decay=0.3")], tmp_path)
    assert other.returncode == 2
    assert "optim.weight_decay was 0.01, now 0.3" in other.stderr
    chat.write_text(chat.read_text(encoding="utf-8").replace("2", "3"), encoding="utf-8")
    data = qwlit(["train", *TINY, *words(chat, "a")], tmp_path)
    assert data.returncode == 2
    assert "data or the tokenizer changed" in data.stderr


def test_resume_never_starts_anew_and_keeps_what_was_there(unfinished, chat, tmp_path):
    train(words(chat, "a", "resume=never"), tmp_path)
    assert summary(unfinished)["resumed_from"] is None
    assert (tmp_path / "runs" / "a.before-1" / "metrics.jsonl").exists()


def test_a_run_folder_in_use_is_refused(chat, tmp_path):
    long = words(chat, "a", "train.max_steps=100000")
    process = subprocess.Popen(
        warm_command(["train", *TINY, *long]), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    try:
        while not (tmp_path / "runs/a/metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.1)
        second = qwlit(["train", *TINY, *long], tmp_path)
    finally:
        process.kill()
        process.wait()
    assert second.returncode == 2
    assert "in use by another process" in second.stderr


def test_losses_that_stop_being_finite_stop_the_run_with_code_3_and_name_the_samples(chat, tmp_path):
    done = qwlit(["train", *TINY, *words(chat, "a", "optim.lr=1e30", "scheduler.warmup_steps=0")], tmp_path)
    assert done.returncode == 3, done.stderr
    assert "3 times in a row" in done.stderr and f"{chat}:" in done.stderr and "Traceback" not in done.stderr
    run = tmp_path / "runs/a"
    assert summary(run)["status"] == "stopped"
    skips = [row["step"] for row in rows(run, "events.jsonl") if row["event"] == "skip"]
    assert len(skips) == 3 and skips == list(range(skips[0], skips[0] + 3))


def test_early_stopping_ends_the_run_and_keeps_the_best(chat, tmp_path):
    # A learning rate this high makes the validation loss rise again.
    more = ["optim.lr=0.05", "train.max_steps=200", "validation.every_steps=2", "validation.early_stopping_patience=2"]
    more += ["logging.every_steps=50"]
    run = train(words(chat, "a", *more), tmp_path)
    assert summary(run)["steps"] < 200
    validations = [row["val/loss"] for row in rows(run) if "val/loss" in row]
    assert min(validations) not in validations[-2:]
    assert losses(run)[-1][0] == summary(run)["steps"], "the last step is always logged"
    assert (run / "checkpoints/best").exists()


FAMILIES = [("qwen2", "qwen2_5", True), ("qwen2", "qwen2", False), ("qwen3", "qwen3", True), ("qwen3", "qwen3", False)]


@pytest.mark.parametrize(("architecture", "template", "tied"), FAMILIES)
def test_a_local_folder_with_the_real_vocabulary_is_fine_tuned_and_exported(
    architecture, template, tied, real_tokenizer_folder, chat, tmp_path
):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_config(
        to_hf_config(replace(tiny_architecture(architecture, tied=tied), vocab_size=151_936)), dtype=torch.bfloat16
    )
    save_folder(model, folder)
    shutil.copytree(real_tokenizer_folder(template), folder, dirs_exist_ok=True)
    more = [f"model.path={folder}", f"data.path={chat}", "data.val_fraction=0.2", "run.name=a", "train.max_steps=4"]
    fast = ["optim.lr=1e-2", "preflight.allow=[full_lr]"]
    done = qwlit(["train", "hardware=cpu", *fast, "logging.every_steps=1", *more], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/a"
    assert losses(run)[-1][1] < losses(run)[0][1]
    assert json.loads((run / "manifest.json").read_text())["template"] == template
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    assert exported.dtype == torch.bfloat16 and exported.config.use_cache
    for name, tensor in weights(run, "best").items():
        assert torch.equal(exported.state_dict()[name], tensor.bfloat16())
    AutoTokenizer.from_pretrained(run / "export")


def test_an_exported_adapter_gives_pefts_model_the_trained_logits(chat, tmp_path):
    from peft import PeftModel

    base = save_folder(tiny_causal_lm(), tmp_path / "base")
    file = tmp_path / "tokens.jsonl"
    file.write_text(
        "".join(json.dumps({"input_ids": [i, i + 1, i + 2], "loss_mask": [0, 1, 1]}) + "\n" for i in range(32))
    )
    more = [f"model.path={base}", f"data.path={file}", "run.name=a", "train.max_steps=4", "optim.lr=1e-2"]
    done = qwlit(["train", "hardware=cpu", "recipe=lora", *more], tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/a"
    ids = torch.arange(9)[None]
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain(ids).logits
    adapted = PeftModel.from_pretrained(plain, run / "export")
    injected = AutoModelForCausalLM.from_pretrained(base)
    apply_adapter(injected, AdapterConfig(kind="lora"), dropout=0.0, seed=0)
    injected.load_state_dict(weights(run), strict=False)
    torch.testing.assert_close(adapted(ids).logits, injected.eval()(ids).logits)
    assert not torch.allclose(adapted(ids).logits, before)


def test_a_run_killed_between_a_save_and_its_pointers_finishes_with_the_right_weights(chat, tmp_path):
    run = train(words(chat, "a", "checkpoint.keep_last=5"), tmp_path)
    best = (run / "checkpoints/best").resolve().name
    older = "step-000003" if best != "step-000003" else "step-000004"
    for pointer in ("best", "last"):
        (run / "checkpoints" / pointer).unlink()
        (run / "checkpoints" / pointer).symlink_to(older)
    exported = (run / "export/model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "running"}))
    train(words(chat, "a", "checkpoint.keep_last=5"), tmp_path)
    assert (run / "checkpoints/best").resolve().name == best
    assert (run / "checkpoints/last").resolve().name == "step-000010"
    assert (run / "export/model.safetensors").read_bytes() == exported


@pytest.mark.parametrize("missing", ["config.yaml", "manifest.json"])
def test_an_unfinished_run_without_its_records_is_not_continued_blindly(missing, unfinished, chat, tmp_path):
    (unfinished / missing).unlink()
    again = qwlit(["train", *TINY, *words(chat, "a")], tmp_path)
    assert again.returncode == 2 and again.stderr.count("\n") == 1, again.stderr


def test_a_damaged_checkpoint_is_named(unfinished, chat, tmp_path):
    # The newest one, and one that the guard keeps to go back to.
    for checkpoint in (newest := sorted((unfinished / "checkpoints").glob("step-*"))[-1]).parent.glob("step-*"):
        (checkpoint / "training_state.pt").write_bytes(b"nothing")
    again = qwlit(["train", *TINY, *words(chat, "a")], tmp_path)
    assert again.returncode == 2 and f"{newest.name} is damaged" in again.stderr, again.stderr


def test_a_folder_that_is_no_run_is_left_alone(chat, tmp_path):
    (tmp_path / "runs/a/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/a/checkpoints/mine.txt").write_text("mine")
    for more in ([], ["run.overwrite=true"]):
        done = qwlit(["train", *TINY, *words(chat, "a", *more)], tmp_path)
        assert done.returncode == 2 and "is not a run" in done.stderr
    assert (tmp_path / "runs/a/checkpoints/mine.txt").exists()


def test_sigterm_while_starting_ends_as_preempted(chat, tmp_path):
    process = subprocess.Popen(
        command(["train", *TINY, *words(chat, "a")]),
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "run the same command to resume" in said and "Traceback" not in said
    train(words(chat, "a"), tmp_path)


def test_ctrl_c_while_two_ranks_start_ends_as_interrupted(chat, tmp_path):
    process = subprocess.Popen(
        command(["train", *TINY, *words(chat, "a", "hardware.devices=2")]),
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdout.readline()
    time.sleep(1)
    # A terminal's Ctrl-C goes to every process, also to the rank that is still importing.
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said.count("\n")) == (130, 1), said


def test_a_reader_that_leaves_does_not_end_the_run(chat, tmp_path):
    arguments = " ".join(f"'{word}'" for word in command(["train", *TINY, *words(chat, "a")]))
    subprocess.run(["bash", "-c", f"{arguments} | head -1"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    deadline = time.monotonic() + 60
    while summary(tmp_path / "runs/a")["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert summary(tmp_path / "runs/a")["status"] == "done"


@pytest.mark.parametrize("early", [True, False], ids=["stopped early", "at the last step"])
def test_a_run_killed_after_its_last_step_only_finishes(early, chat, tmp_path):
    more = ["optim.lr=0.05", "validation.every_steps=2", "validation.early_stopping_patience=1"] if early else []
    arguments = words(chat, "a", *more, *(["train.max_steps=60"] if early else []))
    run = train(arguments, tmp_path)
    before, recorded = weights(run), summary(run)
    (run / "summary.json").write_text(json.dumps(recorded | {"status": "running", "steps": None}))
    train(arguments, tmp_path)
    after = summary(run)
    assert (after["status"], after["steps"], after["resumed_from"]) == ("done", recorded["steps"], recorded["steps"])
    assert (after["train_loss_last"], after["val_loss_best"]) == (
        recorded["train_loss_last"],
        recorded["val_loss_best"],
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())


def test_lora_trains_and_saves_the_adapter_only(chat, tmp_path):
    run = train(words(chat, "a", "recipe=lora", "optim.lr=1e-2"), tmp_path)
    assert losses(run)[-1][1] < losses(run)[0][1]
    assert all("lora_" in name for name in weights(run))
    manifest = json.loads((run / "manifest.json").read_text())
    assert 0 < manifest["parameters"]["trainable"] < manifest["parameters"]["total"]


def test_two_processes_train_the_same_model_as_one(chat, tmp_path):
    lines = chat.read_text(encoding="utf-8").splitlines()
    for name, part in (("few", lines[:7]), ("more", lines[20:36])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    exact = ["dropout.attention=0", "dropout.feed_forward=0", "hardware.micro_batch_size=3"]
    exact += ["data.val_fraction=0.0", "data.val_path={few: few.jsonl, more: more.jsonl}"]
    one = train(words(chat, "one", *exact), tmp_path)
    two = train(words(chat, "two", *exact, "hardware.devices=2"), tmp_path, qwlit_process)
    for (step, a), (_, b) in zip(losses(one), losses(two), strict=True):
        assert math.isclose(a, b, rel_tol=2e-5), step
    for key in ("val/loss", "val/few/loss", "val/more/loss"):
        val_one = [row[key] for row in rows(one) if key in row]
        val_two = [row[key] for row in rows(two) if key in row]
        assert len(val_one) == 3 and val_one == pytest.approx(val_two, rel=2e-5)
    left, right = weights(one), weights(two)
    assert all((left[name] - right[name]).abs().max() < 1e-4 for name in left)


def test_a_profile_of_chosen_steps_is_written(chat, tmp_path):
    run = train(words(chat, "a", "profile.steps=[2,3]"), tmp_path)
    trace = json.loads((run / "profile/steps-2-3.json").read_text())
    assert trace["traceEvents"]


def test_torchrun_trains_what_one_process_trains_and_must_agree_with_the_settings(chat, tmp_path):
    exact = ["dropout.attention=0", "dropout.feed_forward=0"]
    one = train(words(chat, "one", *exact), tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "qwlit"]
    arguments = ["train", *TINY, *words(chat, "two", *exact)]

    def launch(*more):
        return subprocess.run(
            [*launcher, *arguments, *more], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
        )

    alone = launch("hardware.devices=1")
    assert alone.returncode != 0 and "2 processes were launched, but hardware.devices=1" in alone.stderr
    done = launch("hardware.devices=2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "runs/two") == [(step, pytest.approx(loss, rel=2e-5)) for step, loss in losses(one)]


@pytest.mark.parametrize("mode", ["reproducible", "strict"])
def test_determinism_modes_train(mode, chat, tmp_path):
    run = train(words(chat, "a", f"determinism={mode}"), tmp_path, qwlit_process)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["determinism"] == mode
    assert manifest["attention"] == ("eager" if mode == "strict" else "sdpa")
    trace = rows(run, "trace.jsonl")
    assert [row["step"] for row in trace] == list(range(1, 11)) and "parameters" in trace[-1]
    assert len({row["samples"] for row in trace}) == 10
    again = train(words(chat, "b", f"determinism={mode}"), tmp_path, qwlit_process)
    assert rows(again, "trace.jsonl") == trace
    other = train(words(chat, "c", f"determinism={mode}", "seed=1"), tmp_path, qwlit_process)
    assert rows(other, "trace.jsonl")[0] != trace[0]


def test_tokenized_rows_need_no_tokenizer(tmp_path):
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "tokens.jsonl"
    with file.open("w") as out:
        for _ in range(40):
            ids = torch.randint(0, 500, (12,), generator=generator).tolist()
            out.write(json.dumps({"input_ids": ids, "labels": [-100] * 4 + ids[4:]}) + "\n")
    run = train(
        [f"data.path={file}", "model.tokenizer=nowhere", "train.max_steps=3", "run.name=a", "dropout=none"], tmp_path
    )
    assert summary(run)["status"] == "done"


READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


@pytest.mark.parametrize("recipe", ["full_sft", "lora"])
def test_between_log_points_nothing_is_read_back_from_the_device(recipe, chat, tmp_path):
    """On CPU a read is only counted; on a GPU each would make the host wait."""
    quiet = ["logging.every_steps=100", "checkpoint.every_steps=100", "validation.every_steps=null"]
    quiet += ["validation.each_epoch=false", "checkpoint.each_epoch=false"]
    asked = [*words(chat, "a", *quiet), f"recipe={recipe}", "train.max_steps=9", "profile.steps=[4,7]"]
    run = train(asked, tmp_path, qwlit_process)
    found = json.loads((run / "profile" / "steps-4-7.json").read_text())["traceEvents"]
    events = [event for event in found if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] == "aten::_fused_adamw_"]
    assert len(steps) >= 4, "the profile shows the steps"

    def inside_the_optimizers_kernel(event):
        # On CPU the kernel looks up its count of steps by itself; on CUDA it does not.
        return any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] for s in steps)

    reads = [event["name"] for event in events if event["name"] in READS and not inside_the_optimizers_kernel(event)]
    assert not reads


@pytest.mark.parametrize(
    "damaged", ["model.safetensors", "optimizer.safetensors", "training_state.pt", "MANIFEST.json"]
)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(damaged, chat, tmp_path):
    asked = words(chat, "cut", "train.max_steps=60", "checkpoint.every_steps=5", "logging.every_steps=1")
    whole = train([*asked, "run.name=whole"], tmp_path)
    cut = tmp_path / "runs" / "cut"
    process = started(asked, cut, logged=14)
    process.kill()
    process.communicate()
    newest = sorted((cut / "checkpoints").glob("step-*/MANIFEST.json"))[-1].parent
    content = bytearray((newest / damaged).read_bytes())
    content[len(content) // 2] ^= 4
    (newest / damaged).write_bytes(content)
    run = train(asked, tmp_path)
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    assert 0 < summary(run)["resumed_from"] < int(newest.name[-6:])
    assert any(row["event"] == "damaged" and newest.name in row["message"] for row in rows(run, "events.jsonl"))
    assert_same_run(whole, run)


def test_a_run_without_a_good_checkpoint_is_not_begun_anew_without_a_word(chat, tmp_path):
    asked = words(chat, "cut", "train.max_steps=400", "checkpoint.every_steps=5", "logging.every_steps=1")
    cut = tmp_path / "runs" / "cut"
    process = started(asked, cut, logged=12)
    process.kill()
    process.communicate()
    for file in (cut / "checkpoints").glob("step-*/model.safetensors"):
        file.unlink()
    done = qwlit(["train", *TINY, *asked], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no good checkpoint left" in done.stderr and "model.safetensors is missing" in done.stderr


def other_base(folder):
    """The same shapes, other weights."""
    file = folder / "model.safetensors"
    save_file({name: tensor * 1.3 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_run_does_not_go_on_with_another_base_model(chat, tmp_path):
    folder = save_folder(tiny_causal_lm(vocab_size=520), tmp_path / "base")
    asked = [f"model.path={folder}", "model.tokenizer=qwlit:demo/tokenizer", f"data.path={chat}", "hardware=cpu"]
    asked += ["recipe=lora", "run.name=a", "train.max_steps=4000", "checkpoint.every_steps=5", "logging.every_steps=1"]
    process = subprocess.Popen(
        warm_command(["train", *asked]), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    while not list((tmp_path / "runs" / "a" / "checkpoints").glob("step-*/MANIFEST.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 75
    other_base(folder)
    done = qwlit(["train", *asked], tmp_path)
    assert done.returncode == 2 and "the base model changed since runs/a started" in done.stderr


def test_frozen_weights_are_exported_as_they_were_to_the_bit_also_in_bf16(chat, tmp_path):
    base = tiny_causal_lm("qwen2", tied=False, vocab_size=520)
    folder = save_folder(base, tmp_path / "base")
    asked = [f"model.path={folder}", "model.tokenizer=qwlit:demo/tokenizer", f"data.path={chat}", "hardware=cpu"]
    asked += ["recipe=freeze", "run.name=a", "train.max_steps=3", "hardware.precision=bf16-mixed", "optim.lr=1e-2"]
    asked += ["preflight.allow=[full_lr]"]
    assert qwlit(["train", *asked, "dropout=none"], tmp_path).returncode == 0
    exported = load_file(tmp_path / "runs" / "a" / "export" / "model.safetensors")
    for name, weight in base.state_dict().items():
        frozen = "embed_tokens" in name or "layers.0." in name
        if "k_proj.bias" not in name:
            assert torch.equal(exported[name], weight) == frozen, name


def test_an_adapter_beside_random_weights_names_no_base(chat, tmp_path):
    folder = save_folder(tiny_causal_lm(vocab_size=520), tmp_path / "base")
    asked = [f"model.path={folder}", "model.tokenizer=qwlit:demo/tokenizer", f"data.path={chat}", "hardware=cpu"]
    asked += ["model.init=random", "recipe=lora", "run.name=a", "train.max_steps=2"]
    assert qwlit(["train", *asked], tmp_path).returncode == 0
    adapter = tmp_path / "runs" / "a" / "export" / "adapter_config.json"
    assert json.loads(adapter.read_text())["base_model_name_or_path"] is None
