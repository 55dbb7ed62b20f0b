"""What `plan` says would fit is judged by the whole run."""

import io

import pytest
from rich.console import Console

from qwlit.config.compose import compose
from qwlit.core.devices import GIB
from qwlit.planning.remedies import fitting_overrides
from qwlit.planning.run_plan import build_plan

WORDS = ["model=qwen2_5_7b", "model.init=random", "hardware=rtx4090"]
WORDS += ["model.tokenizer=qwlit:demo/tokenizer", "dropout=none"]


# On 8 devices a training step takes 26 GiB on each. Afterwards the first one answers with the unsharded model: 31 GiB.
@pytest.mark.parametrize(("gpu_memory_gb", "eight_devices_fit"), [(30, False), (32, True)])
def test_devices_that_have_room_for_the_steps_but_not_for_the_answers_do_not_fit(gpu_memory_gb, eight_devices_fit):
    words = [*WORDS, f"hardware.gpu_memory_gb={gpu_memory_gb}"]
    plan = build_plan(compose(words), Console(file=io.StringIO()), preview=True)
    peaks = {" ".join(overrides): peak / GIB for overrides, peak in fitting_overrides(words, plan)}
    assert ("hardware.devices=8" in peaks) == eight_devices_fit
    if eight_devices_fit:
        assert 30 < peaks["hardware.devices=8"] < 31


# The optimizer takes 149 GiB of the host's memory, whose devices share it.
@pytest.mark.parametrize(("host_memory_gb", "fits"), [(120, False), (300, True)])
def test_devices_that_have_room_on_a_host_that_has_none_for_the_optimizer_do_not_fit(host_memory_gb, fits):
    words = ["model=qwen3_8b", "model.init=random", "hardware=a100", "hardware.offload_optimizer=true", "dropout=none"]
    words += ["model.tokenizer=qwlit:demo/tokenizer", f"hardware.host_memory_gb={host_memory_gb}"]
    plan = build_plan(compose(words), Console(file=io.StringIO()), preview=True)
    assert (["hardware.devices=4"] in [overrides for overrides, _ in fitting_overrides(words, plan)]) == fits
