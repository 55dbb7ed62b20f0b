"""Damaged weights and moments, and replicas that part: found, named, and left behind at the newest checkpoint."""

import json
import subprocess

import pytest
import torch

from qwlit.training.resilience.state_health import LARGEST_WEIGHT, checksums, extremes, find_problem
from tests.faults.test_checkpoints import chat, words  # noqa: F401 - a fixture
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, TINY, assert_same_run, interpreter, qwlit_process, rows, summary, train

CPU = torch.device("cpu")
PROBLEMS = ("has a negative value", "has a value that no update makes", "is not finite")
DDP, FSDP = (["hardware.devices=2", f"hardware.strategy={strategy}"] for strategy in ("ddp", "fsdp"))
LAYOUTS = {"one process": [], "ddp": DDP, "fsdp": FSDP}
DAMAGE = [("parameter", value) for value in ("nan", "inf", "1e20")]
DAMAGE += [(moment, value) for moment in ("exp_avg", "exp_avg_sq") for value in ("nan", "inf")] + [("exp_avg_sq", "-1")]


@pytest.fixture(scope="module")
def clean(chat, tmp_path_factory):  # noqa: F811
    """A function from a layout to its run without damage."""
    folder, runs = tmp_path_factory.mktemp("clean"), {}

    def run(layout):
        if layout not in runs:
            name = layout.replace(" ", "-")
            runs[layout] = train([*words(name, chat), *LAYOUTS[layout]], folder, qwlit_process)
        return runs[layout]

    return run


def damaged(layout, faults, chat, folder, *more):  # noqa: F811
    """Train with damage planted, on all ranks where the fault names none; return the process and the run folder."""
    done = subprocess.run(
        [interpreter(), "-m", "tests.faults.faulty", "train", *TINY, *words("a", chat), *LAYOUTS[layout], *more],
        cwd=folder,
        env=ENVIRONMENT | {"QWLIT_FAULTS": json.dumps(faults)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done, folder / "runs/a"


def decisions(run):
    return [row["decision"] for row in rows(run, "events.jsonl") if row["event"] == "rollback"]


CASES = [(layout, *damage) for layout in LAYOUTS for damage in DAMAGE]
DRAWN = CASES if LONG else [CASES[0], CASES[2], CASES[7], CASES[9], CASES[19]]


@pytest.mark.parametrize(("layout", "kind", "value"), DRAWN)
def test_after_damage_the_run_repeats_the_steps_and_ends_as_without(layout, kind, value, clean, chat, tmp_path):  # noqa: F811
    done, run = damaged(layout, [{"kind": kind, "steps": [5], "value": value}], chat, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (decision,) = decisions(run)
    assert decision["to_step"] == 4 and decision["cause"] == "state"
    name = "down_proj.weight" if kind == "parameter" else f"{kind} of "
    assert name in decision["reason"] and any(problem in decision["reason"] for problem in PROBLEMS)
    assert summary(run)["rollbacks"] == 1
    assert_same_run(clean(layout), run)


@pytest.mark.parametrize("rank", [0, 1] if LONG else [1])
def test_a_flipped_bit_in_one_of_two_replicas_is_named_and_left_behind(rank, clean, chat, tmp_path):  # noqa: F811
    done, run = damaged("ddp", [{"kind": "flip", "steps": [5], "rank": rank}], chat, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (decision,) = decisions(run)
    assert "the weights of the 2 ranks are not the same, first in " in decision["reason"]
    assert decision["from_step"] == 5 and decision["to_step"] == 4 and decision["cause"] == "state"
    assert_same_run(clean("ddp"), run)


def test_a_run_that_may_not_go_back_names_the_tensor_and_no_learning_rate(chat, tmp_path):  # noqa: F811
    nan = [{"kind": "exp_avg", "steps": [5], "value": "nan"}]
    done, run = damaged("one process", nan, chat, tmp_path, "guard=strict")
    assert done.returncode == 3 and "optim.lr=" not in done.stdout, done.stdout + done.stderr
    assert done.stderr.endswith("is not finite; check the memory and the devices of this machine\n"), done.stderr
    assert not (run / "diagnosis.json").exists()


def test_a_flipped_bit_in_a_frozen_weight_is_gone_after_the_run_went_back(chat, tmp_path):  # noqa: F811
    # Rank 0: DDP gives its weights to the other ranks, so they would all have the bit after the run went back.
    flip = [{"kind": "flip", "steps": [5], "rank": 0, "frozen": True}]
    done, run = damaged("ddp", flip, chat, tmp_path, "adapter.kind=lora")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [decision["to_step"] for decision in decisions(run)] == [4]
    clean = train([*words("clean", chat), *DDP, "adapter.kind=lora"], tmp_path, qwlit_process)
    assert_same_run(clean, run)


def test_nan_in_a_frozen_weight_is_no_fault_of_the_data(chat, tmp_path):  # noqa: F811
    nan = [{"kind": "parameter", "steps": [5], "value": "nan", "frozen": True}]
    more = ("adapter.kind=lora", "guard.max_nonfinite_steps=1")
    done, run = damaged("one process", nan, chat, tmp_path, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    (decision,) = decisions(run)
    assert (decision["to_step"], decision["cause"]) == (4, "state") and "base_layer.weight" in decision["reason"]
    clean = train([*words("clean", chat), *more], tmp_path)
    assert_same_run(clean, run)


def test_the_weights_of_the_replicas_are_compared_before_a_checkpoint_is_written(chat, tmp_path):  # noqa: F811
    flip = [{"kind": "flip", "steps": [6], "rank": 0}]
    done, run = damaged("ddp", flip, chat, tmp_path, "logging.every_steps=100")
    assert done.returncode == 0, done.stdout + done.stderr
    (decision,) = decisions(run)
    assert decision["from_step"] == 6 and decision["to_step"] == 4


def test_damage_that_comes_back_with_its_samples_is_left_behind_with_them(chat, tmp_path):  # noqa: F811
    fault = [{"kind": "exp_avg", "steps": [5], "value": "nan", "again": True}]
    done, run = damaged("one process", fault, chat, tmp_path)
    assert done.returncode == 0, done.stderr
    # The run went back to its start, so the first decision is among the records that were set aside.
    first = [row["decision"] for row in rows(run, "rolled_back.jsonl") if row.get("event") == "rollback"]
    assert [decision["cause"] for decision in first + decisions(run)] == ["state", "divergence"]
    assert all(decision["reason"].startswith("exp_avg of ") for decision in first + decisions(run))


def test_each_problem_of_a_tensor_is_found():
    state = {
        "exp_avg of a": torch.full((3,), 2 * LARGEST_WEIGHT),
        "exp_avg_sq of a": torch.tensor([1.0, -1e-30]),
        "a": torch.tensor([[1.0, -2 * LARGEST_WEIGHT]]),
        "b": torch.tensor([1.0, torch.nan]),
        "c": torch.tensor([-torch.inf, 1.0], dtype=torch.bfloat16),
        "a slice without rows": torch.zeros(0, 4),
        "d": -torch.ones(2),
    }
    ends = zip(state, *extremes(state, CPU).tolist(), strict=True)
    found = [find_problem(*tensor, largest_weight=LARGEST_WEIGHT) for tensor in ends]
    assert found == [None, PROBLEMS[0], PROBLEMS[1], PROBLEMS[2], PROBLEMS[2], None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_one_flipped_bit_changes_the_checksum_of_its_tensor_only(dtype):
    torch.manual_seed(0)
    weights = {name: (torch.randn(50, 3) * 9).to(dtype) for name in "ab"}
    before = checksums(weights, CPU)
    bits = weights["b"].view(torch.uint8).view(-1)
    for bit in range(8 * len(bits)):
        bits[bit // 8] ^= 1 << bit % 8
        after = checksums(weights, CPU)
        assert after[0] == before[0] and after[1] != before[1]
        bits[bit // 8] ^= 1 << bit % 8
