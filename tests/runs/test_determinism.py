"""What determinism= sets in every rank, what it refuses, and what a run says of it."""

import hashlib
import json
import os

import pytest
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed

from qwlit.config.compose import compose
from qwlit.core.errors import ConfigError
from qwlit.planning.setup import resolve_setup
from qwlit.training.determinism import prepare_determinism
from qwlit.training.tracking.manifest import VARIABLES, public_command, threads_of_rank
from tests.invariance.worker import machine
from tests.runs.runs import DEMO, ENVIRONMENT, TINY, interpreter, succeed_together, tasks_of_srun, train

SHORT = [*TINY, "data.exact_match=0", "train.max_steps=2", "train.max_epochs=null", "run.name=told", "dropout=pretrain"]
UNTOLD = {key: value for key, value in ENVIRONMENT.items() if key not in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")}


@pytest.mark.parametrize("launcher", ["qwlit", "srun"])
def test_every_rank_is_told_before_it_meets_the_others(launcher, tmp_path):
    words = [interpreter(), "-m", "tests.runs.told_ranks", "train", *SHORT]
    words += ["hardware.devices=2", "determinism=reproducible"]
    tasks = [UNTOLD] if launcher == "qwlit" else [UNTOLD | task for task in tasks_of_srun()]
    succeed_together([(words, task) for task in tasks], tmp_path, timeout=100)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_ALGO": "Ring",
            "deterministic": True,
            "cuda": False,
        }


def test_workspaces_that_are_not_fixed_are_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0; run: unset CUBLAS_WORKSPACE_CONFIG"):
        prepare_determinism("reproducible")
    prepare_determinism("fast")


@pytest.mark.parametrize("tf32", [True, False])
def test_products_in_tf32_are_allowed_where_the_setting_says_so_and_not_in_the_next_run(tf32):
    prepare_determinism("fast", tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "sdpa (auto: varlen needs CUDA)"),
        (["model.attention=eager"], "eager"),
        (["determinism=strict"], "eager (determinism=strict)"),
        (["hardware=a100", "dropout=none"], "varlen (auto)"),
        (["hardware=a100", "dropout.attention=0.1"], "varlen (auto)"),
        (["hardware=a100", "hardware.precision=32-true"], "sdpa (auto: varlen needs hardware.precision=bf16-mixed"),
    ],
)
def test_auto_says_which_attention_it_took_and_why(words, said):
    assert resolve_setup(compose([*TINY, *words]), trust_profile=True).attention.startswith(said)


def test_the_manifest_has_what_decides_the_numbers_and_no_secret(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "mine-and-nobody-elses")
    (tmp_path / "rows.jsonl").write_bytes((DEMO / "val.jsonl").read_bytes())
    words = [*SHORT, "data.path=rows.jsonl", "data.val_fraction=0.1", "data.system='password=mine'"]
    run = train(words, tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["command"][:1] == ["train"] and "data.system='password=***'" in manifest["command"]
    assert "mine" not in (run / "manifest.json").read_text()
    assert manifest["data_files"] == {"rows.jsonl": hashlib.sha256((tmp_path / "rows.jsonl").read_bytes()).hexdigest()}
    assert manifest["cpu"]["model"] and manifest["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert manifest["packages"]["torch"] == torch.__version__ and manifest["libraries"]["OpenMP"]
    assert set(manifest["variables"]) <= set(VARIABLES)


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("api_key=abc", "api_key=***"),
        ("+logger.wandb.API_KEY=abc", "+logger.wandb.API_KEY=***"),
        ("db.password=a-b", "db.password=***"),
        ("data.path=https://me:pw@host/rows.jsonl", "data.path=https://***@host/rows.jsonl"),
        ("slurm.setup=[\"export WANDB_API_KEY='a b'\"]", 'slurm.setup=["export WANDB_API_KEY=***"]'),
        ('slurm.setup=["export HF_TOKEN=\\"ab\\""]', 'slurm.setup=["export HF_TOKEN=***"]'),
        ("slurm.setup=['export HF_TOKEN=$MINE']", "slurm.setup=['export HF_TOKEN=$MINE']"),
        ("hardware.micro_batch_tokens=64", "hardware.micro_batch_tokens=64"),
        ("model.tokenizer=folder", "model.tokenizer=folder"),
    ],
)
def test_what_looks_like_a_secret_is_masked_in_the_command(typed, kept):
    assert public_command(["/usr/bin/qwlit", "train", typed]) == ["train", kept]
    assert public_command(["mine.py", typed]) is None


def test_the_manifest_has_the_threads_that_lightning_gives_each_rank_later(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    told = threads_of_rank(machine("ddp", 2))
    try:
        _set_num_threads_if_needed(2)
        assert told == torch.get_num_threads() == threads_of_rank(machine("ddp", 2))
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(before)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads_of_rank(machine("ddp", 2)) == threads_of_rank(machine("single", 1)) == before
