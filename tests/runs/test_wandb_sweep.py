"""Sweeps by W&B. `wandb sweep` and `wandb agent` are the real clients, the server the stub of wandb_stub.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs.runs import TINY, children, command, interpreter, qwlit_process, summary
from tests.runs.wandb_runs import chat_rows, here, recorded, sent


@pytest.fixture
def chat(tmp_path):
    return chat_rows(tmp_path)


# The agent asks the server every 5 s by itself.
QUICK = "import wandb.wandb_agent as a; a.Agent.POLL_INTERVAL = 0.5; from wandb.cli.cli import cli; cli()"
TRAIN = ["${env}", "${interpreter}", "-m", "qwlit", "train", *TINY]


def sweep_file(folder, chat, parameters, *more, method="grid", **entries):
    """Write a sweep in W&B's format."""
    short = ["train.max_steps=4", "validation.every_steps=2", "logger=wandb", *more]
    document = {
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": parameters,
        "command": [*TRAIN, f"data.path={chat}", "data.val_fraction=0.2", *short, "${args_no_hyphens}"],
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(document | entries))


@pytest.fixture
def agents(online):
    """The environment of an agent, which starts trials by the name of python; here python has imported everything."""
    return online | {"PATH": f"{Path(interpreter()).parent}{os.pathsep}{os.environ['PATH']}"}


def create(folder, environment):
    """`wandb sweep search.yaml`: return the sweep's path."""
    client = [sys.executable, "-m", "wandb", "sweep", "--project", "qwlit", "search.yaml"]
    done = subprocess.run(client, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stderr.split("wandb agent ")[1].split()[0]


def start_agent(folder, environment, path):
    client = [sys.executable, "-c", QUICK, "agent", path]
    return subprocess.Popen(client, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finished(agent):
    said = agent.communicate(timeout=120)[1]
    assert agent.returncode == 0, said
    return said


def trial_folders(folder):
    """Run folders by the id that their run has on W&B."""
    return {json.loads(file.read_text())["id"]: file.parent for file in (folder / "runs").rglob("wandb.json")}


def assert_complete(stub, folder, *, status="done"):
    """Every trial is one run with every row, whose settings are those drawn for it."""
    folders = trial_folders(folder)
    assert folders.keys() == stub.runs.keys()
    for id, run in stub.runs.items():
        assert folders[id].name.endswith(f"-{id}")
        assert sent(run) == recorded(folders[id])
        assert (run.state, summary(folders[id])["status"]) == ("finished", status)
        settings = run.config["qwlit"]["value"]
        for name, drawn in run.config.items():
            if "." in name:
                section, key = name.split(".")
                assert settings[section][key] == drawn["value"]


def test_a_grid_by_the_clients_own_commands_of_trials_in_two_processes_is_three_runs(chat, stub, agents, tmp_path):
    sweep_file(tmp_path, chat, {"train.max_grad_norm": {"values": [0.5, None, 2]}}, "hardware.devices=2")
    finished(start_agent(tmp_path, agents, create(tmp_path, agents)))
    assert len(stub.runs) == 3
    assert_complete(stub, tmp_path)
    assert {run.config["qwlit"]["value"]["train"]["max_grad_norm"] for run in stub.runs.values()} == {0.5, None, 2}


def test_a_sweep_by_two_agents_of_ours_is_five_whole_runs(chat, stub, agents, tmp_path):
    rate = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    ratio = {"distribution": "uniform", "min": 0.05, "max": 0.2}
    sweep_file(tmp_path, chat, {"optim.lr": rate, "scheduler.warmup_ratio": ratio}, method="bayes")
    asked = ["sweep", "sweep=search.yaml", "trials=5", "agents=2", "train.global_batch_size=8"]
    done = qwlit_process(asked, tmp_path, environment=online_only(agents))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(stub.runs) == 5 and len(stub.agents) == 2
    assert_complete(stub, tmp_path)
    assert {run.config["qwlit"]["value"]["train"]["global_batch_size"] for run in stub.runs.values()} == {8}
    assert all(folder.parent == tmp_path / "runs" / "search" for folder in trial_folders(tmp_path).values())
    path = "tester/qwlit/sweep0"
    assert f"wandb agent --forward-signals {path}" in done.stdout
    assert f'sbatch --array=1-2 --gpus=1 --wrap="python -m wandb agent --forward-signals {path}"' in done.stdout


def online_only(environment):
    """Without the folder of python: `sweep` must find it."""
    return environment | {"PATH": os.environ["PATH"]}


def test_hyperband_ends_a_trial_cleanly_and_the_agent_goes_on(chat, stub, agents, tmp_path):
    # Over its long warm-up the second one learns next to nothing.
    steps = {"train.max_steps": {"values": [6, 100_000, 5]}}
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    sweep_file(tmp_path, chat, steps, "validation.early_stopping_patience=null", early_terminate=rule)
    said = finished(start_agent(tmp_path, agents, create(tmp_path, agents)))
    assert "the sweep has ended this trial" in said and "Traceback" not in said
    folders = trial_folders(tmp_path)
    ends = [summary(folders[id])["status"] for id in ("trial0", "trial1", "trial2")]
    assert ends == ["done", "pruned", "done"]
    assert stub.sweeps["sweep0"].stopped == {"trial1"}
    for id, run in stub.runs.items():
        assert (run.state, run.exit_code) == ("finished", 0) and sent(run) == recorded(folders[id])
    assert stub.runs["trial1"].summary["status"] == "pruned"
    saved = json.loads((folders["trial1"] / "checkpoints/last/MANIFEST.json").read_text())["step"]
    assert saved == summary(folders["trial1"])["steps"]


def test_a_killed_trial_is_resumed_by_its_whole_config_and_is_one_run(chat, stub, agents, tmp_path):
    values = {"optim.lr": {"values": [2e-3]}, "train.max_grad_norm": {"values": [None]}}
    endless = "validation.early_stopping_patience=null"
    sweep_file(tmp_path, chat, values, "train.max_steps=60", "validation.every_steps=20", endless)
    agent = start_agent(tmp_path, agents, create(tmp_path, agents))
    while not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("step-*/MANIFEST.json")):
        assert agent.poll() is None
        time.sleep(0.05)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    finished(agent)
    assert stub.handed_out == [("run", "trial0"), ("resume", "trial0")]
    assert stub.runs["trial0"].config.keys() >= {"_wandb", "qwlit", "optim.lr"}
    assert_complete(stub, tmp_path)
    (folder,) = trial_folders(tmp_path).values()
    assert summary(folder)["resumed_from"] > 0 and summary(folder)["steps"] == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_agents_and_trials_end_with_the_sweep_and_the_trial_is_saved(number, chat, stub, online, tmp_path):
    sweep_file(tmp_path, chat, {"train.max_steps": {"values": [100_000]}}, "validation.every_steps=50")
    asked = command(["sweep", "sweep=search.yaml", "validation.early_stopping_patience=null"])
    process = subprocess.Popen(asked, cwd=tmp_path, env=online, stderr=subprocess.PIPE, text=True)
    while not stub.runs or not sent(stub.only_run()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    while stub.only_run().exit_code is None:
        time.sleep(0.05)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "resume the sweep with: python -m wandb agent --forward-signals tester/qwlit/sweep0" in said
    assert stub.only_run().exit_code == 255, "W&B says: killed by the user"
    (folder,) = trial_folders(tmp_path).values()
    assert summary(folder)["status"] == "interrupted" and sent(stub.only_run()) == recorded(folder)


def test_what_no_agent_could_run_is_refused_and_agents_0_only_tells_how(chat, stub, nobody, online, tmp_path):
    sweep_file(tmp_path, chat, {"optim.lr": {"values": [1e-3]}})

    def refused(environment, *more):
        done = here(["sweep", "sweep=search.yaml", *more], tmp_path, environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "no API key, `wandb login` sets one); or use backend=optuna" in refused(nobody)
    assert "write logger=wandb into" in refused(online, "logger=none")
    assert not stub.sweeps
    done = here(["sweep", "sweep=search.yaml", "agents=0", "trials=7"], tmp_path, online)
    assert done.returncode == 0 and not stub.agents, done.stderr
    assert "sbatch --array=1-7" in done.stdout and stub.sweeps["sweep0"].config["run_cap"] == 7
