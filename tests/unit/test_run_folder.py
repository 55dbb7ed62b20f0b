"""The run folder and its checkpoints: whole or not there, cut back exactly, one writer."""

import contextlib
import errno
import hashlib
import json
import math
import os
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwlit.config.compose import compose
from qwlit.config.run import recipe_settings
from qwlit.core.disk import explaining_disk_errors
from qwlit.core.errors import ConfigError
from qwlit.core.files import read_json_lines
from qwlit.core.ranks import launch_token
from qwlit.run.resume import (
    prepare_folder,
    refuse_changed_recipe,
    refuse_changed_validation,
    refuse_occupied_folder,
)
from qwlit.training.async_readback import AsyncReadback
from qwlit.training.checkpointing.checkpoint import read_checkpoint, read_weights, write_checkpoint
from qwlit.training.checkpointing.folder import (
    delete_checkpoint,
    find_strays,
    link_checkpoint,
    linked_checkpoint,
    list_checkpoints,
    newest,
)
from qwlit.training.checkpointing.manifest import MANIFEST, find_damage, forget_hashes, seal_of
from qwlit.training.checkpointing.saving import Checkpointing
from qwlit.training.checkpointing.shards import ShardReader
from qwlit.training.config import CheckpointConfig
from qwlit.training.tracking.record_file import RecordFile
from qwlit.training.tracking.run_folder import RunFolder
from qwlit.training.tracking.run_lock import ENDED, RunLock
from qwlit.training.tracking.wandb_uploads import Uploads


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "runs" / "a")
    made.checkpoints.mkdir(parents=True)
    return made


def save(folder, step, value=None):
    name = "loss_model.causal_lm.model.norm.weight"
    path = folder.checkpoints / f"step-{step:06d}"
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.full((3,), 0.5)}
    checkpoint = {
        "state_dict": {name: torch.full((3,), float(step if value is None else value))},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "optimizer_parameters": [name],
        "global_step": step,
        "loops": {"a": [1, None]},
        "callbacks": {},
    }
    write_checkpoint(checkpoint, path)
    return path


def test_a_checkpoint_reads_back_and_lists_its_files_with_their_hashes(folder):
    path = save(folder, 7)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["step"] == 7
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert set(manifest["files"]) | {MANIFEST} == {p.name for p in path.iterdir()}
    assert dict(read_weights(path))["model.norm.weight"].tolist() == [7, 7, 7]
    loaded = read_checkpoint(path)
    assert loaded["loops"] == {"a": [1, None]} and "loss_model.causal_lm.model.norm.weight" in loaded["state_dict"]
    (optimizer,) = loaded["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert {key: value.tolist() for key, value in optimizer["state"][0].items()} == {"step": 7, "exp_avg": [0.5] * 3}


def test_a_checkpoint_cut_off_while_written_is_not_taken_for_one(folder):
    save(folder, 7)
    (folder.checkpoints / ".step-000009.tmp").mkdir()
    (folder.checkpoints / "step-000008").touch()
    assert [p.name for p in list_checkpoints(folder)] == ["step-000007"]
    assert newest(folder).name == "step-000007"


def test_checkpoints_are_ordered_by_step_not_by_name(folder):
    save(folder, 999_999)
    save(folder, 1_000_000)
    assert newest(folder).name == "step-1000000"


def test_a_pointer_moves_in_one_go(folder):
    for step in (1, 2):
        link_checkpoint(folder, "best", save(folder, step))
        assert linked_checkpoint(folder, "best").name == f"step-{step:06d}"
    assert linked_checkpoint(folder, "last") is None


def test_cutting_back_drops_later_rows_and_half_lines(folder):
    for step in (1, 2, 3):
        folder.append_metrics(step, {"train/loss": 0.1 * step})
        folder.append_event(step, "checkpoint")
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    folder.drop_records_after(2)
    assert [row["step"] for row in read_json_lines(folder.path / "metrics.jsonl")] == [1, 2]
    assert (folder.path / "metrics.jsonl").read_text().endswith("}\n")


def test_what_json_cannot_say_is_null_and_the_file_stays_json(folder):
    folder.append_metrics(1, {"train/loss": math.nan, "optim/grad_norm": math.inf})
    row = json.loads((folder.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "train/loss": None, "optim/grad_norm": None}


def test_overwriting_deletes_and_never_resuming_sets_aside(folder):
    save(folder, 3)
    folder.write_summary(status="interrupted")
    assert prepare_folder(folder, resume="auto", overwrite=False).step == 3
    start = prepare_folder(folder, resume="never", overwrite=False)
    assert start.checkpoint is None and (start.renamed_to / "checkpoints" / "step-000003").is_dir()
    save(folder, 4)
    assert prepare_folder(folder, resume="auto", overwrite=True).checkpoint is None
    assert [p.name for p in folder.path.parent.iterdir() if not p.name.startswith(".")] == ["a", "a.before-1"]


def test_one_process_at_a_time_writes_to_a_run(folder):
    with RunLock(folder), pytest.raises(ConfigError, match="in use by another process"), RunLock(folder):
        pass
    with RunLock(folder):
        pass


def test_changed_mathematics_is_named_with_both_values():
    def settings(*words):
        return recipe_settings(compose(["data.path=a/chat.jsonl", "model.path=here/base", *words]).config)

    elsewhere = ["data.path=/b/chat.jsonl", "model.path=/there/base", "hardware=a100x4", "data.strict=true"]
    elsewhere.append("data.val_path={math: a.jsonl, chat: [b.jsonl]}")
    refuse_changed_recipe(settings(), settings(*elsewhere))
    with pytest.raises(ConfigError, match=r"optim.lr was 1e-05, now 0.1"):
        refuse_changed_recipe(settings(), settings("optim.lr=0.1"))
    with pytest.raises(ConfigError, match=r"data.columns.text was body, now null, data.max_samples was 5, now null"):
        refuse_changed_recipe(settings("data.columns={text: body}", "data.max_samples=5"), settings())


SWAPPED = {"data.path": ["1"], "data.val_path.x": ["b"], "data.val_path.y": ["a"]}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (SWAPPED, r"data\.val_path\.x, data\.val_path\.y: the validation sets changed"),
        ({"data.path": ["1"], "data.val_path.x": ["a"]}, r"data\.val_path\.y: the validation"),
        ({"data.path": ["1"], "data.val_path.y": ["b"], "data.val_path.x": ["a"]}, r"data\.val_path: the validation"),
    ],
)
def test_other_validation_sets_of_the_same_training_data_are_named(folder, now, named):
    refuse_changed_validation(folder, now)  # no manifest, as in a run of an earlier version
    before = {"data.path": ["1"], "data.val_path.x": ["a"], "data.val_path.y": ["b"]}
    folder.write_json("manifest.json", {"contents": before})
    refuse_changed_validation(folder, before)
    refuse_changed_validation(folder, now | {"data.path": ["2"]})  # the data or the tokenizer, which is named elsewhere
    with pytest.raises(ConfigError, match=f"^{named}"):
        refuse_changed_validation(folder, now)


def test_late_numbers_come_back_in_order_with_their_tags():
    reader = AsyncReadback()
    value = torch.tensor([1.0])
    reader.push("a", value)
    value += 1  # what was pushed is a copy
    reader.push("b", value)
    assert list(reader.pop()) == [("a", [1.0]), ("b", [2.0])]
    assert list(reader.pop(wait=True)) == []


@pytest.fixture
def size_limit():
    """A function that limits the size of the files of this process."""

    def limit(size=resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    yield limit
    limit()


def test_records_that_do_not_fit_are_written_later_and_no_half_line_stays(folder, size_limit):
    file = folder.path / "metrics.jsonl"
    folder.append_metrics(1, {"train/loss": 1.0})
    size_limit(file.stat().st_size + 7)
    for step in (2, 3):
        folder.append_metrics(step, {"train/loss": 1.0})
    assert len(folder.kept_records["metrics.jsonl"]) == 2
    size_limit()
    folder.append_metrics(4, {"train/loss": 1.0})
    assert file.read_text() == "".join(f'{{"step": {step}, "train/loss": 1.0}}\n' for step in (1, 2, 3, 4))
    assert folder.kept_records == {}


def test_a_file_that_cannot_be_written_for_long_costs_one_line_at_each_record(folder, monkeypatch):
    (folder.path / "metrics.jsonl").mkdir()
    tried = []
    write = RecordFile._write
    monkeypatch.setattr(RecordFile, "_write", lambda self, data: tried.append(len(data)) or write(self, data))
    for step in range(1, 100):
        folder.append_metrics(step, {})
    assert len(folder.kept_records["metrics.jsonl"]) == 99 and max(tried) == len('{"step": 1}\n')
    (folder.path / "metrics.jsonl").rmdir()
    folder.append_metrics(100, {})
    assert [row["step"] for row in read_json_lines(folder.path / "metrics.jsonl")] == list(range(1, 101))


def test_a_checkpoint_brings_back_the_records_that_were_never_written_and_no_others(folder):
    folder.append_metrics(1, {"train/loss": 1.0})
    lines = [f'{{"step": {step}, "train/loss": 1.0}}\n' for step in (1, 2)]
    again = RunFolder(folder.path)
    again.keep_records({"metrics.jsonl": lines})
    again.append_metrics(3, {"train/loss": 1.0})
    assert [row["step"] for row in read_json_lines(folder.path / "metrics.jsonl")] == [1, 2, 3]


def test_going_back_with_a_full_disk_loses_no_record_and_doubles_none(folder, size_limit):
    for step in (1, 2, 3):
        folder.append_metrics(step, {"train/loss": 1.0})
    size_limit((folder.path / "metrics.jsonl").stat().st_size + 7)
    folder.append_metrics(4, {"train/loss": 1.0})
    folder.append_event(2, "rollback", reason="x" * 200)
    folder.append_event(4, "skip", reason="x" * 200)
    folder.set_aside_records_after(2, 0)
    folder.drop_records_after(2)
    folder.keep_records(folder.kept_records)  # as the checkpoint does from which the run goes on
    size_limit()
    folder.append_metrics(3, {"train/loss": 2.0})
    folder.write_kept_records()
    assert [(row["step"], row["train/loss"]) for row in read_json_lines(folder.path / "metrics.jsonl")] == [
        *((1, 1.0), (2, 1.0), (3, 2.0))
    ]
    assert [row["event"] for row in read_json_lines(folder.path / "events.jsonl")] == ["rollback"]
    assert [(row["file"], row["step"]) for row in read_json_lines(folder.path / "rolled_back.jsonl")] == [
        *(("metrics.jsonl", 3), ("metrics.jsonl", 4), ("events.jsonl", 4))
    ]


def test_a_start_that_was_killed_before_its_first_summary_is_no_other_programs_folder(folder):
    (folder.path / ".summary.json.7.tmp").touch()
    refuse_occupied_folder(folder, overwrite=False)
    (folder.path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not a run"):
        refuse_occupied_folder(folder, overwrite=False)


def flip_unnoticed(file):
    """Change a bit, and neither size nor time, as a failing disk does."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_bit_that_the_disk_flips_after_the_resume_is_found(folder):
    path = save(folder, 3)
    assert find_damage(path) is None
    read_checkpoint(path)
    flip_unnoticed(path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors does not match"):
        dict(read_weights(path))


@pytest.mark.parametrize("shape", [(1,), (4,)])
def test_weights_of_another_shape_are_refused_and_not_spread(folder, shape):
    path = save(folder, 3)
    with pytest.raises(ConfigError, match=r"cannot be loaded .*model\.norm\.weight \[3\] instead of"):
        next(read_weights(path, {"model.norm.weight": torch.zeros(shape)}))
    with pytest.raises(ConfigError, match=r"cannot be loaded \(missing: model\.bias"):
        next(read_weights(path, {name: torch.zeros(3) for name in ("model.norm.weight", "model.bias")}))


def test_a_damaged_checkpoint_is_not_uploaded(folder):
    flip_unnoticed(save(folder, 3) / "model.safetensors")
    assert Uploads(SimpleNamespace(id="a"), folder).finish(wait=True)
    (event,) = read_json_lines(folder.path / "events.jsonl")
    assert "step-000003 was not uploaded to W&B (it is damaged: model.safetensors" in event["message"]


def test_a_step_that_is_saved_again_while_it_waits_for_its_upload_is_uploaded_too(folder, monkeypatch):
    sent, may_send = [], threading.Event()

    def send(uploads, held, aliases):
        assert may_send.wait(30) and find_damage(held) is None
        sent.append(dict(read_weights(held))["model.norm.weight"].tolist())

    monkeypatch.setattr(Uploads, "_send", send)
    uploads = Uploads(SimpleNamespace(id="a"), folder)
    for value in (1.0, 2.0):
        uploads.add(save(folder, 3, value))
        delete_checkpoint(folder.checkpoints / "step-000003")
    may_send.set()
    assert uploads.finish(wait=True) and sent == [[1.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors", "events.jsonl"])
def test_a_file_that_cannot_be_read_just_now_is_no_damage(folder, name, number, monkeypatch):
    path = save(folder, 3)
    folder.append_event(3, "checkpoint", manifest=seal_of(path))
    folder.write_summary(status="running")
    answer_reading(monkeypatch, name, number)
    with pytest.raises(ConfigError, match=f"{name}: .*; .* run the same command again"), explaining_disk_errors():
        prepare_folder(folder, resume="auto", overwrite=False)
    with pytest.raises(OSError, match=name):
        dict(read_weights(path))
    assert newest(folder) == path


def answer_reading(monkeypatch, name, number):
    """Let every attempt to open files of this name end in an error."""

    def open(self, *arguments, real=Path.open, **options):
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.EBADMSG])
def test_a_file_on_a_bad_sector_is_damaged(folder, number, monkeypatch):
    path = save(folder, 3)
    answer_reading(monkeypatch, "model.safetensors", number)
    assert find_damage(path).startswith("model.safetensors ")


def test_a_process_that_may_open_no_more_files_does_not_blame_the_checkpoint(folder):
    path = save(folder, 3)
    forget_hashes()
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), contextlib.ExitStack()
    in_use = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        for read in (find_damage, read_checkpoint, lambda path: ShardReader([path / "model.safetensors"])):
            with pytest.raises(OSError, match="Too many open files"):
                read(path)
    finally:
        held.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_not_read(folder):
    with pytest.raises(ConfigError, match=r"cannot be loaded \(model\.norm\.weight is not finite\)"):
        next(read_weights(save(folder, 3, math.nan)))


@pytest.mark.parametrize("exists", [True, False])
def test_records_that_link_out_of_the_run_are_refused(folder, exists):
    folder.write_summary(status="running")
    outside = folder.path.parent / "outside"
    if exists:
        outside.touch()
    (folder.path / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"metrics.jsonl links to .*outside, outside the run; remove the link"):
        refuse_occupied_folder(folder, overwrite=False)
    (folder.path / "metrics.jsonl").unlink()
    (folder.path / "rows").touch()
    (folder.path / "metrics.jsonl").symlink_to("rows")
    refuse_occupied_folder(folder, overwrite=False)


def test_a_checkpoint_that_cannot_be_kept_for_its_upload_is_no_error(folder):
    uploads = Uploads(SimpleNamespace(id="a"), folder)
    (folder.path / "wandb").mkdir()
    (folder.path / "wandb" / "uploads").touch()
    uploads.add(save(folder, 3))
    (event,) = read_json_lines(folder.path / "events.jsonl")
    assert "step-000003 was not uploaded to W&B" in event["message"] and uploads.finish(wait=True)


def test_where_events_jsonl_was_removed_every_checkpoint_stays_good(folder):
    paths = [save(folder, step) for step in (1, 2, 3)]
    (paths[0] / MANIFEST).unlink()
    state = {"best_val_loss": None, "best_step": None, "stopped_early": False}
    Checkpointing(CheckpointConfig(), None, folder).load_state_dict(state)
    assert [find_damage(path) is None for path in paths] == [False, True, True]
    delete_checkpoint(paths[1])
    save(folder, 2, 7.0)
    assert "not the one of which events.jsonl has the hash" in find_damage(paths[1])


def test_a_pipe_in_place_of_a_pointer_is_passed_over(folder):
    os.mkfifo(folder.checkpoints / "last")
    assert find_strays(folder) == ["last"]


def test_a_summary_that_could_not_be_written_is_part_of_the_next(folder):
    (folder.path / "summary.json").mkdir()
    folder.try_write_summary(status="running", steps=3)
    (folder.path / "summary.json").rmdir()
    folder.write_summary(status="done")
    assert folder.read_summary() == {"status": "done", "steps": 3}


def test_a_pointer_that_cannot_be_written_is_a_line_and_no_error(folder, size_limit, monkeypatch):
    path = save(folder, 1)

    def symlink(*arguments, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.symlink", symlink)
    assert link_checkpoint(folder, "last", path) is None and linked_checkpoint(folder, "last") == path
    size_limit(3)
    assert "last: File too large; raise the limit" in link_checkpoint(folder, "last", path)


@pytest.mark.parametrize(("changed", "refused"), [(10.0, True), (86400.0, False)])
def test_a_lock_file_with_a_time_to_come_does_not_end_a_rank_that_waits(folder, monkeypatch, changed, refused):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("qwlit.training.tracking.run_lock.PROCESS_START", time.time() - 100)
    folder.lock_file.parent.mkdir()
    folder.lock_file.write_text(f"process 1 on x\n{launch_token()}{ENDED}")
    os.utime(folder.lock_file, (time.time() - 50 + changed,) * 2)
    reason = "rank 0 ended before the run started" if refused else "rank 0 did not come"
    with pytest.raises(ConfigError, match=reason), RunLock(folder, wait_seconds=0.3):
        pass
