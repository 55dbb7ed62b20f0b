"""The diagnosis of runs that were really trained, each with a planted trouble or none."""

import pytest

from qwlit.report.diagnosis import diagnose
from tests.long import LONG
from tests.reports import comparison_of
from tests.runs.runs import DEMO, TINY, qwlit

MODEL = [word for word in TINY if word.startswith(("model", "hardware"))]
WORDS = {
    "healthy": (["optim.lr=3e-3"], set()),
    "diverging": (["optim.lr=10", "guard=off", "train.max_grad_norm=null"], {"diverging loss"}),
    "guarded": (["optim.lr=10"], {"diverging loss"}),
    "oscillating": (["optim.lr=0.3", "guard=off", "scheduler=constant"], {"unstable loss"}),
    "overfitting": (["optim.lr=3e-3", "data.path=few.jsonl", "validation.each_epoch=false"], {"overfitting"}),
    "slow": (["optim.lr=2e-5"], {"slow convergence"}),
    "tuned": (["base", "recipe=full_sft", "optim.lr=1e-4"], set()),
    "lora": (["base", "recipe=lora", "optim.lr=1e-3", "train.global_batch_size=2"], set()),
    "slow tuning": (["base", "recipe=full_sft", "optim.lr=1e-7"], {"slow convergence"}),
}
"""The overrides of each kind, and its symptoms. "base" stands for the export of the first healthy run."""


@pytest.mark.skipif(not LONG, reason="QWLIT_LONG=1: a quarter of an hour")
def test_trained_runs_are_named_rightly(tmp_path):
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:16]), encoding="utf-8")
    (tmp_path / "some.jsonl").write_text("".join(lines[:1500]), encoding="utf-8")
    val = (DEMO / "val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    (tmp_path / "val.jsonl").write_text("".join(val), encoding="utf-8")
    common = ["data.path=some.jsonl", "data.val_path=val.jsonl", "data.exact_match=0", "data.max_seq_len=512"]
    common += ["dropout=none", "train.max_steps=120", "scheduler.warmup_steps=10", "validation.every_steps=15"]
    common += ["train.global_batch_size=16", "validation.early_stopping_patience=null", "logging.every_steps=1"]
    common += ["guard.probe_every_steps=null", "checkpoint.each_epoch=false"]
    common += ["preflight.allow=[full_lr,full_lr_large,lr_range]"]
    base = [f"model.path={tmp_path / 'runs/healthy-0/export'}", "hardware=cpu"]
    named = {}
    for seed in range(2):
        for kind, (words, expected) in WORDS.items():
            name = f"{kind.replace(' ', '-')}-{seed}"
            model = base if words[0] == "base" else [*MODEL, "recipe=pretrain"]
            typed = {word.partition("=")[0]: word for word in [*common, *words] if word != "base"}
            qwlit(["train", *model, *typed.values(), f"seed={seed}", f"run.name={name}"], tmp_path)
            (run,) = comparison_of(tmp_path / "runs" / name).runs
            named[name] = ({symptom.name for symptom in diagnose(run).symptoms}, expected)
            print(name, *named[name], flush=True)
    assert {name: found for name, (found, expected) in named.items() if found != expected} == {}
