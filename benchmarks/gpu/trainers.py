"""Trainers side by side on the same work, see `benchmarks.train`: what the parts `full` and `lora` share."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.arms import why_not
from benchmarks.gpu.tables import COMPARED, INVALID, Cells, NotMeasured, Scale, Tables, said_how
from benchmarks.train import Measured, run_arm, verdict
from benchmarks.work import CUDA_CASES, Case, prepare, samples_in_order, tokens_of_steps
from qwlit.config.compose import compose
from qwlit.core.devices import detect_devices
from qwlit.model.flops import count_flops
from qwlit.model.loss_model import build_meta_model

ARMS = ("qwlit", "trl_flash_liger", "trl_flash", "trl_liger", "trl_best", "qwlit_auto", "raw", "trl_compiled")
"""qwlit first, the fastest of TRL next: what is cut off should be the least needed. LoRA goes without raw."""
MOST_SECONDS = 150.0
"""Of an arm, which takes about 50 (assumption): one that compiles for ever must leave time for the others."""
FASTER, SHARE = "qwlit is faster by", "qwlit's share"
TABLE = "40 steps of 64 samples, mean length 512, 40 % supervised, micro-batches of 16"


def measure_case(tables: Tables, scale: Scale, *, adapter: bool) -> None:
    """Run all arms on one case; every row says whether its losses agree with qwlit's."""
    case = next(case for case in CUDA_CASES if case.adapter == adapter)
    if scale.toy:
        case = Case(
            "toy", 1000, 0.4, adapter=adapter, steps=3, mean_length=40.0, global_batch_size=4, device=scale.device
        )
        case = replace(case, micro_batch_size=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(case, folder)
        tokens, flops = tokens_of_steps(folder), flops_per_token(case, folder)
        ours: list[Measured] = []
        for arm in (arm for arm in ARMS if not (adapter and arm == "raw")):
            measured = partial(one, case, folder, arm, tokens=tokens, flops=flops, ours=ours)
            tables.measure(TABLE, {"trainer": arm}, measured)


def one(case: Case, folder: Path, arm: str, *, tokens: list[int], flops: float, ours: list[Measured]) -> Cells:
    """Run one arm and return its row; the first one, qwlit, is put into `ours`."""
    if reason := why_not(arm, case):
        raise NotMeasured(reason)
    seen = run_arm(case, folder, arm, tokens, most_seconds=MOST_SECONDS)
    if arm == "qwlit":
        ours.append(seen)
    if ours:
        losses = verdict(case, seen, ours[0]) if arm != "qwlit" else "what the others are compared with"
    else:
        losses = f"{INVALID}: qwlit failed, so nothing shows that this is the same work"
    peak = detect_devices().peak_flops if case.on_cuda else None
    return {
        "tokens/s": seen.speed,
        FASTER: ours[0].speed / seen.speed if ours else None,
        "MFU": seen.speed * flops / peak if peak else None,
        "seconds a step": seen.seconds_per_step[0],
        "peak GiB": seen.memory,
        SHARE: ours[0].memory / seen.memory if ours else None,
        "how": said_how(seen.how),
        COMPARED: losses,
    }


def flops_per_token(case: Case, folder: Path) -> float:
    """Return the model FLOPs of a token, the mean over the samples; the head's unsupervised rows do not count."""
    recipe = "lora" if case.adapter else "full_sft"
    config = compose([f"model.path={folder}/model", f"recipe={recipe}", "dropout=none"]).config
    model = build_meta_model(config.model, config.adapter, config.dropout, config.freeze)
    samples = [(len(row["input_ids"]), sum(label >= 0 for label in row["labels"])) for row in samples_in_order(folder)]
    total = count_flops(model).of(
        num_tokens=sum(length for length, _ in samples),
        num_supervised_tokens=sum(supervised for _, supervised in samples),
        num_token_pairs=sum(length**2 / 2 for length, _ in samples),
    )
    return total / sum(length for length, _ in samples)
