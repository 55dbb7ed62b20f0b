"""The mathematics do not depend on the machine: any layout of a step over micro-batches and ranks trains the same.

QWLIT_LONG=1 has every layout of every kind on every number of ranks.
"""

import math
from pathlib import Path

import pytest
import torch

from tests.invariance.worker import KINDS, LEVELS, LR, STEPS
from tests.long import LONG
from tests.runs.runs import ENVIRONMENT, free_port, interpreter, succeed_together

ROOT = Path(__file__).parents[2]
WORLDS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)]


def launch(out: Path, model_type: str, adapter: str, strategy: str, world_size: int) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    meeting |= {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    words = [interpreter(), "-m", "tests.invariance.worker", str(out), model_type, adapter, strategy, str(world_size)]
    ranks = [([*words, str(rank)], ENVIRONMENT | meeting | {"LOCAL_RANK": str(rank)}) for rank in range(world_size)]
    succeed_together(ranks, ROOT, timeout=280)


@pytest.fixture(scope="module", params=KINDS, ids=["-".join(k) for k in KINDS])
def found(request, tmp_path_factory):
    """(strategy, world size) → what its runs saw."""
    folder = tmp_path_factory.mktemp("invariance")
    found = {}
    # What differs between the kinds is no matter of how many ranks there are.
    for strategy, world in WORLDS if LONG or request.param == KINDS[0] else WORLDS[:3]:
        out = folder / f"{strategy}{world}.pt"
        launch(out, *request.param, strategy, world)
        found[strategy, world] = torch.load(out, weights_only=True)
    return found


@pytest.fixture(scope="module")
def seen(found):
    """(strategy, world size, packing, samples, tokens) → what that run saw."""
    return {(*world, *layout): record for world, each in found.items() for layout, record in each["layouts"].items()}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / max(float(b.double().norm()), 1e-30))


def test_all_layouts_and_world_sizes_ran(seen):
    assert len(seen) in ({5 * 12} if LONG else {3 * 12 + 2 * 6, 3 * 6})
    assert all(len(record["losses"]) == STEPS for record in seen.values())


def test_first_gradients_agree_to_1e_6_relative_in_every_tensor(seen):
    reference = seen["single", 1, True, 1, None]["gradients"]
    assert reference
    for layout, record in seen.items():
        assert record["gradients"].keys() == reference.keys()
        for name, gradient in record["gradients"].items():
            assert difference(gradient, reference[name]) < 1e-6, (layout, name)


def test_losses_over_ten_steps_agree_to_2e_5_relative(seen):
    reference = seen["single", 1, True, 1, None]["losses"]
    assert reference[-1] < reference[0]
    for layout, record in seen.items():
        for step, (ours, theirs) in enumerate(zip(record["losses"], reference, strict=True)):
            assert math.isclose(ours, theirs, rel_tol=2e-5), (layout, step)


def test_weights_after_ten_steps_agree_within_a_tenth_of_the_learning_rate(seen):
    reference = seen["single", 1, True, 1, None]["weights"]
    for layout, record in seen.items():
        for name, weight in record["weights"].items():
            assert float((weight - reference[name]).abs().max()) < 0.1 * LR, (layout, name)


def test_levels_of_memory_do_not_change_the_losses(found):
    sharded = [each["levels"] for each in found.values() if each["levels"]]
    assert sharded
    for runs in sharded:
        first, *others = zip(LEVELS, runs, strict=True)
        for level, record in others:
            if level["reduce_once"] == first[0]["reduce_once"]:
                assert record["losses"] == first[1]["losses"], level
            # Gradients that are reduced in every micro-batch are summed in another order.
            assert record["losses"] == pytest.approx(first[1]["losses"], rel=1e-6), level


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(strategy, tmp_path):
    launch(tmp_path / "poison", "qwen3", "poison", strategy, 2)
    first, second = (torch.load(tmp_path / f"poison.{rank}", weights_only=True) for rank in range(2))
    for seen in (first, second):
        assert seen["skipped"] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
        assert torch.equal(seen["after"][2], seen["after"][3])
        assert not torch.equal(seen["after"][3], seen["after"][4])
    assert all(torch.equal(a, b) for a, b in zip(first["after"], second["after"], strict=True))
