"""Whether a save begins with a copy in host memory."""

import pytest

from qwlit.config.compose import compose
from qwlit.core.console import console
from qwlit.planning.run_plan import build_plan


@pytest.mark.parametrize(("host_memory_gb", "is_copied"), [(480, True), (40, False)])
def test_on_cuda_the_copies_of_a_nodes_ranks_take_at_most_half_of_its_host_memory(host_memory_gb, is_copied):
    words = ["hardware=a100x4", "model=qwen3_1_7b", "recipe=full_sft", "data.path=x.jsonl"]
    plan = build_plan(compose([*words, f"hardware.host_memory_gb={host_memory_gb}"]), console(), preview=True)
    # 12 bytes for each of 1.7 billion parameters.
    assert plan.saves.num_bytes == pytest.approx(20.6e9, rel=0.01)
    assert plan.saves.is_copied is is_copied
