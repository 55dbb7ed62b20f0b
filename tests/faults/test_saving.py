"""Saves that cannot be written, and states that must not be saved."""

import errno
import json
import pickle
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import qwlit as package
from qwlit.core.errors import ConfigError, GuardStop
from qwlit.training.checkpointing import checkpoint as checkpoint_module
from qwlit.training.checkpointing.checkpoint import Ranks, read_weights
from qwlit.training.checkpointing.finite import find_nonfinite
from qwlit.training.checkpointing.writer import CheckpointWriter
from tests.faults.test_checkpoints import chat, words  # noqa: F401 - a fixture
from tests.runs.runs import assert_same_run, qwlit, rows, summary, train


@pytest.fixture
def full_disk(monkeypatch):
    """A function that lets the given saves (1, 2, …) fail for want of space."""
    real = checkpoint_module.write_file
    saves = []

    def fill(failing) -> list:
        def write_file(path, pieces):
            if path.name == "model.safetensors":
                saves.append(path.parent.name)
                if len(saves) in failing:
                    path.write_bytes(b"a part of it")
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, pieces)

        monkeypatch.setattr(checkpoint_module, "write_file", write_file)
        return saves

    return fill


def test_a_full_disk_at_a_save_is_said_and_the_training_goes_on(full_disk, chat, tmp_path):  # noqa: F811
    whole = train(words("whole", chat), tmp_path)
    full_disk({2, 3})
    done = qwlit(["train", *words("a", chat)], tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for step in (4, 6):
        assert f"the checkpoint of step {step} could not be written: No space left on device" in said
    run = tmp_path / "runs/a"
    assert [row["step"] for row in rows(run, "events.jsonl") if row["event"] == "save_failed"] == [4, 6]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000002", "step-000008", "best", "last"}
    assert_same_run(whole, run)


def test_three_full_disks_in_a_row_stop_the_run_and_it_resumes_to_the_same_bits(full_disk, chat, tmp_path):  # noqa: F811
    whole = train(words("whole", chat, "train.max_steps=10"), tmp_path)
    full_disk({2, 3, 4})
    done = qwlit(["train", *words("a", chat, "train.max_steps=10")], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "the checkpoint of step 8 could not be written: No space left on device" in done.stderr
    assert "and 2 before it; free disk space and run the same command to resume from step 2" in done.stderr
    assert summary(tmp_path / "runs/a")["status"] == "failed"
    again = train(words("a", chat, "train.max_steps=10"), tmp_path)
    assert summary(again)["resumed_from"] == 2
    assert_same_run(whole, again)


def test_a_last_step_that_cannot_be_saved_ends_the_run_at_once(full_disk, chat, tmp_path):  # noqa: F811
    full_disk({4})
    done = qwlit(["train", *words("a", chat)], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "free disk space and run the same command to resume from step 6" in done.stderr


class Poison(Callback):
    """Puts a value into a tensor before a step."""

    def __init__(self, step: int, value: float, key: str | None) -> None:
        self.step, self.value, self.key = step, value, key

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step + 1 == self.step:
            state = pl_module.optimizers(use_pl_optimizer=False).state
            parameter = next(p for name, p in pl_module.named_parameters() if name.endswith("down_proj.weight"))
            tensor = parameter.data if self.key is None else state[parameter][self.key]
            tensor.view(-1)[0] = self.value


@pytest.mark.parametrize("step", [4, 8], ids=["on the way", "at the last step"])
@pytest.mark.parametrize(("key", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", float("inf"))])
@pytest.mark.parametrize("guard", ["off", "strict"])
def test_a_state_that_is_not_finite_is_never_saved_or_exported(guard, key, value, step, chat, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GuardStop, match=rf"stopped at step {step}: .*down_proj.weight is not finite"):
        package.train(*words("a", chat, f"guard={guard}"), callbacks=[Poison(step, value, key)])
    run = tmp_path / "runs/a"
    assert summary(run)["status"] == "stopped" and not (run / "export").exists()
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{step - 2:06d}"
    assert not any(find_nonfinite(dict(read_weights(path))) for path in saved)
    done = qwlit(["train", *words("a", chat)], tmp_path)
    assert done.returncode == 0 and summary(run)["resumed_from"] == step - 2


def test_the_first_tensor_that_is_not_finite_is_named():
    whole = {"a": torch.ones(3), "empty": torch.ones(0), "count": torch.tensor([2**40])}
    assert find_nonfinite(whole) is None and find_nonfinite({}) is None
    for value in (torch.nan, torch.inf, -torch.inf):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            broken = torch.ones(5, dtype=dtype)
            broken[3] = value
            assert find_nonfinite(whole | {"b": broken, "c": torch.tensor(torch.nan)}) == "b"


class Unsendable(Exception):
    """An error that pickle cannot write, as RollbackNeeded."""

    def __init__(self, message) -> None:
        super().__init__(message)
        self.function = lambda: None


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(OSError(errno.ENOSPC, "No space left"), None), (ConfigError("it is wrong"), 2), (Unsendable("it is lost"), 1)],
)
def test_an_error_of_one_rank_is_raised_on_all_and_names_the_rank_on_the_others(error, exit_code, monkeypatch):
    everyone, sent = threading.Barrier(3, timeout=30), {}

    def all_gather_object(results, own, group):
        sent[threading.current_thread().name] = pickle.dumps(own)
        everyone.wait()
        results[:] = [pickle.loads(sent[str(rank)]) for rank in range(3)]

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    raised = {}

    def work(rank):
        def action():
            if rank == 1:
                raise error

        try:
            Ranks(rank, 3).together(action)
        except Exception as failure:
            raised[rank] = failure

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised[1] is error and sorted(raised) == [0, 1, 2]
    for other in (raised[0], raised[2]):
        assert "rank 1" in str(other) and getattr(other, "exit_code", None) == exit_code
        assert getattr(other, "errno", None) == getattr(error, "errno", None)


def test_an_error_of_a_save_that_is_not_the_disks_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def write_file(path, pieces):
        raise KeyError("a dtype that safetensors lacks")

    monkeypatch.setattr(checkpoint_module, "write_file", write_file)
    writer = CheckpointWriter()
    optimizer = {"state": {}, "param_groups": []}
    state = {"state_dict": {}, "optimizer_states": [optimizer], "optimizer_parameters": [], "global_step": 1}
    writer.save_checkpoint(state, tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(KeyError, match="dtype"):
        writer.finish()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_save_is_written_while_the_training_goes_on_and_holds_the_step_at_which_it_began(tmp_path, monkeypatch):
    name = "loss_model.causal_lm.model.norm.weight"
    weight, moment = torch.ones(4), torch.ones(4)
    go_on = threading.Event()
    real = checkpoint_module.write_file

    def write_file(path, pieces):
        assert go_on.wait(30)
        return real(path, pieces)

    monkeypatch.setattr(checkpoint_module, "write_file", write_file)
    writer = CheckpointWriter()
    for step in (1, 2):
        go_on.clear()
        optimizer = {"state": {0: {"exp_avg": moment}}, "param_groups": [{"params": [0]}]}
        state = {"state_dict": {name: weight}, "optimizer_states": [optimizer], "optimizer_parameters": [name]}
        path = tmp_path / "checkpoints" / f"step-{step:06d}"
        writer.save_checkpoint(state | {"global_step": step}, path)
        assert writer.is_writing and not path.exists()
        weight += 1
        moment += 1
        go_on.set()
        assert writer.finish() is None and not writer.is_writing
        assert json.loads((path / "MANIFEST.json").read_text())["step"] == step
        assert dict(read_weights(path))["model.norm.weight"].tolist() == [step] * 4
