"""`logger=wandb`. The client is the real one, the server the stub of wandb_stub.py."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml

from tests.runs.runs import TINY, children, free_port, qwlit_process, rows, started, summary, train, warm_pid
from tests.runs.wandb_runs import chat_rows, here, recorded, sent
from tests.wandb_stub import KEY


@pytest.fixture
def chat(tmp_path):
    return chat_rows(tmp_path)


# Of a long run: nothing by epochs, which here are of three steps.
LONG = [
    "train.max_steps=400",
    "validation.every_steps=50",
    "validation.each_epoch=false",
    "checkpoint.each_epoch=false",
]


def words(chat, *more):
    short = ["train.max_steps=10", "validation.every_steps=4", "checkpoint.every_steps=3", "run.name=a"]
    return [f"data.path={chat}", "data.val_fraction=0.2", *short, "logger=wandb", *more]


def test_a_run_online_is_there_to_the_last_row_with_its_settings_under_one_key(chat, stub, online, tmp_path):
    asked = words(chat, "logger.tags=[x,y]", "logger.group=g")
    done = qwlit_process(["train", *TINY, *asked], tmp_path, environment=online)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder, run = tmp_path / "runs" / "a", stub.only_run()
    assert f"wandb     {stub.url}" in done.stdout and done.stdout.count("wandb ") == 1
    assert sent(run) == recorded(folder) and len(sent(run)) > 10
    assert (run.state, run.exit_code, run.project) == ("finished", 0, "qwlit")
    assert run.config.keys() == {"_wandb", "qwlit"}
    assert run.config["qwlit"]["value"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert summary(folder).items() >= {k: v for k, v in run.summary.items() if k in summary(folder)}.items()
    assert (run.summary["status"], run.summary["steps"]) == ("done", 10)
    assert (run.record["displayName"], run.record["groupName"], run.record["tags"]) == ("a", "g", ["x", "y"])
    record = json.loads((folder / "wandb.json").read_text())
    assert (record["id"], record["mode"], record["complete"]) == (run.id, "online", True)
    written = [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert not written, "the key lands in no file"

    # As if the server had gone away at the end: the same command sends what it lacks.
    del run.history[5:]
    run.summary["_step"] = 4
    (folder / "wandb.json").write_text(json.dumps(record | {"complete": False}))
    again = here(["train", *TINY, *asked], tmp_path, online)
    assert again.returncode == 0, again.stderr
    assert sent(run) == recorded(folder)
    assert json.loads((folder / "wandb.json").read_text())["complete"]
    assert here(["train", *TINY, *asked], tmp_path, online).returncode == 2


@pytest.mark.parametrize("server_has", ["nothing", "more than the checkpoint"])
def test_after_kill_9_a_run_goes_on_as_one_with_every_row_once(server_has, chat, stub, online, tmp_path):
    if server_has == "nothing":
        del online["WANDB__FILE_STREAM_TRANSMIT_INTERVAL"]
    asked = words(chat, *LONG, "checkpoint.keep_last=1000")
    folder = tmp_path / "runs" / "a"
    process = started(asked, folder, logged=40, environment=online)
    while server_has != "nothing" and len(stub.only_run().history) < 40:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name[-6:]) > 21:
            shutil.rmtree(checkpoint)
    assert len(stub.only_run().history) == 0 if server_has == "nothing" else len(stub.only_run().history) >= 40
    train(asked, tmp_path, partial(here, environment=online))
    assert summary(folder)["resumed_from"] == 21
    run = stub.only_run()
    assert [(row["step"], "val/loss" in row) for row in run.history] == [
        (row["step"], "val/loss" in row) for row in rows(folder)
    ]
    assert [row.get("train/loss") for row in run.history] == [row.get("train/loss") for row in rows(folder)]
    assert run.state == "finished"


@pytest.mark.parametrize("goes_to", ["the run", "all processes of the job"])
def test_a_preempted_run_says_so_and_goes_on_as_one(goes_to, chat, stub, online, tmp_path):
    asked = words(chat, *LONG)
    folder = tmp_path / "runs" / "a"
    process = started(asked, folder, logged=20, environment=online)
    if goes_to != "the run":
        for helper in children(warm_pid(process.pid)):
            os.kill(helper, signal.SIGTERM)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert said.count("\n") == 1 and "run the same command to resume" in said
    run = stub.only_run()
    assert (run.state, run.summary["status"]) == ("preempted", "preempted")
    assert sent(run) == recorded(folder)
    train(asked, tmp_path, partial(here, environment=online))
    assert stub.only_run().state == "finished"
    assert sent(stub.only_run()) == recorded(folder)


def test_without_a_key_a_run_is_offline_and_can_be_sent_later_as_one(chat, stub, nobody, tmp_path):
    asked = words(chat, "train.max_steps=40")
    process = started(asked, tmp_path / "runs" / "a", logged=8, environment=nobody)
    process.kill()
    process.communicate()
    done = here(["train", *TINY, *asked], tmp_path, nobody)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "wandb " in line]
    assert "offline (no API key, `wandb login` sets one); `wandb sync runs/a/wandb/offline-run-" in line
    folder = tmp_path / "runs" / "a"
    parts = [str(part) for part in (folder / "wandb").glob("offline-run-*")]
    client = [sys.executable, "-m", "wandb", "sync", *parts]
    subprocess.run(client, cwd=tmp_path, env=nobody | stub.environment(), capture_output=True, check=True, timeout=60)
    assert sent(stub.only_run()) == recorded(folder)


def test_what_would_leave_a_run_without_wandb_is_refused_in_one_line(chat, nobody, tmp_path):
    nowhere = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY}
    done = here(["train", *TINY, *words(chat)], tmp_path, nobody | nowhere)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert nowhere["WANDB_BASE_URL"] in done.stderr and "WANDB_MODE=offline or logger=none" in done.stderr
    assert not (tmp_path / "runs" / "a").exists()

    def refused(*more, **environment):
        done = here(["train", *TINY, *words(chat, *more)], tmp_path, nobody | environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "there is no API key" in refused(WANDB_MODE="online")
    assert "upload_checkpoints=true needs W&B online" in refused("logger.upload_checkpoints=true")
    assert "set logger=wandb" in refused("logger=none", "logger.upload_checkpoints=true")
    trial = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}
    assert "add logger=wandb to the sweep's command" in refused("logger=none", **trial)
    assert "gets no metrics while W&B is offline" in refused(WANDB_MODE="offline", **trial)
    assert not (tmp_path / "runs" / "a").exists()


def test_every_saved_checkpoint_is_a_version_of_one_artifact_though_its_folder_is_gone(chat, stub, online, tmp_path):
    asked = words(chat, "logger.upload_checkpoints=true", "checkpoint.keep_last=1", "checkpoint.every_steps=1")
    folder = train(asked, tmp_path, partial(here, environment=online))
    saved = [row["step"] for row in rows(folder, "events.jsonl") if row["event"] == "checkpoint"]
    assert saved == list(range(1, 11)) and len(list((folder / "checkpoints").glob("step-*"))) <= 2
    assert len({artifact.name for artifact in stub.artifacts}) == 1
    steps = {int(alias[5:]): artifact for artifact in stub.artifacts for alias in artifact.aliases if "step-" in alias}
    assert sorted(steps) == saved
    for artifact in steps.values():
        assert artifact.committed and artifact.type == "model" and artifact.run == stub.only_run().id
        for name, seal in json.loads(artifact.files["MANIFEST.json"])["files"].items():
            assert hashlib.sha256(artifact.files[name]).hexdigest() == seal["sha256"]
    best = json.loads((folder / "checkpoints/best/MANIFEST.json").read_text())["step"]
    assert "best" in steps[best].aliases and "last" in steps[10].aliases
    assert [row["step"] for row in rows(folder, "events.jsonl") if row["event"] == "uploaded"] == saved
    assert not list((folder / "wandb" / "uploads").iterdir())
