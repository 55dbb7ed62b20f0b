"""The benchmark's arms do the same work: tiny, and without a clock."""

import sys

import pytest

from benchmarks.train import TOLERANCE, disagreement, run
from benchmarks.work import Case, prepare, tokens_of_steps
from tests.runs.runs import ENVIRONMENT, interpreter


@pytest.mark.parametrize("adapter", [False, True])
def test_qwlit_a_raw_loop_and_transformers_have_the_same_losses(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter())
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    case = Case("tiny", 300, 0.4, adapter=adapter, steps=4, mean_length=40.0, lr=1e-3)
    prepare(case, tmp_path)
    assert len(tokens_of_steps(tmp_path)) == case.steps
    losses = {}
    for arm in ("qwlit", "raw", "hf"):
        record, peak = run(arm, tmp_path)
        assert len(record["ends"]) == len(record["losses"]) == case.steps and peak > 0
        losses[arm] = record["losses"]
    assert losses["qwlit"][0] != losses["qwlit"][1]
    assert disagreement(losses["qwlit"], losses["raw"]) < TOLERANCE
    assert disagreement(losses["qwlit"], losses["hf"]) < TOLERANCE
