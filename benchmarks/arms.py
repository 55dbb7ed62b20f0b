"""One trainer doing the work, in a process of its own: `python -m benchmarks.arms ARM FOLDER OUT`.

Each arm writes the loss and the end of every step, in seconds. What a step costs is measured from the end of the last
step of the warm-up to the end of the last, so that loading, compiling and warming up do not count.
"""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from benchmarks.litgpt_arm import litgpt
from benchmarks.machine import settings
from benchmarks.peers import (
    flash_attention,
    hf,
    trl,
    trl_best,
    trl_compiled,
    trl_flash,
    trl_flash_liger,
    trl_liger,
    trl_padding_free,
)
from benchmarks.work import SEED, Case, Record, read_case


def qwlit(case: Case, folder: Path, record: Record) -> None:
    """The command line, as a user types it, with the micro-batches that all arms have."""
    limits = [f"hardware.micro_batch_size={case.micro_batch_size}", "hardware.micro_batch_tokens=null"]
    _command_line(case, folder, record, limits)


def qwlit_auto(case: Case, folder: Path, record: Record) -> None:
    """The command line, with the micro-batches that it chooses by itself."""
    _command_line(case, folder, record, [])


def _command_line(case: Case, folder: Path, record: Record, limits: list[str]) -> None:
    words = [
        *(f"model.path={folder}/model", f"data.path={folder}/samples.jsonl", f"run.root={folder}/runs"),
        *(
            "run.name=qwlit",
            "run.overwrite=true",
            f"hardware={'auto' if case.on_cuda else 'cpu'}",
            f"seed={SEED}",
            "dropout=none",
            "logging.every_steps=1",
        ),
        *(f"train.max_steps={case.steps}", f"train.global_batch_size={case.global_batch_size}"),
        *(*limits, f"optim.lr={case.lr}", "optim.weight_decay=0"),
        *("scheduler=constant", "scheduler.warmup_steps=0", f"recipe={'lora' if case.adapter else 'full_sft'}"),
        *("dropout=none", "preflight.allow=[full_lr]"),
    ]
    train_with_clock(words, lambda module, batch: record.step())
    rows = (folder / "runs" / "qwlit" / "metrics.jsonl").read_text().splitlines()
    logged = [row for row in map(json.loads, rows) if "train/loss" in row]
    record.losses, record.grad_norms = ([row[key] for row in logged] for key in ("train/loss", "optim/grad_norm"))
    manifest = json.loads((folder / "runs" / "qwlit" / "manifest.json").read_text())
    record.how = {key: manifest[key] for key in ("precision", "attention", "compiled", "activation_checkpointing")}
    record.how |= _limits((folder / "runs" / "qwlit" / "config.yaml").read_text())


def _limits(config: str) -> dict[str, int | None]:
    """Return the limits of a micro-batch that a run took."""
    hardware = yaml.safe_load(config)["hardware"]
    return {key: hardware[key] for key in ("micro_batch_size", "micro_batch_tokens")}


def train_with_clock(words: list[str], on_step: Callable[[Any, Any], None]) -> None:
    """Run the command line `train`, and call `on_step` with its module and batch at the end of every step."""
    from lightning.pytorch.callbacks import Callback

    from qwlit.commands.train import main
    from qwlit.run import callbacks as run_callbacks

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            on_step(module, batch)

    build = run_callbacks.build_trainer

    def with_clock(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
        # First, so that the last step ends before its checkpoint, which the other arms do not write.
        return build(*args, callbacks=[Clock(), *callbacks], **kwargs)

    run_callbacks.build_trainer = with_clock
    try:
        main(words)
    finally:
        run_callbacks.build_trainer = build


def raw(case: Case, folder: Path, record: Record) -> None:
    """A plain torch loop over qwlit's own modules: what Lightning and everything around the step cost."""
    from lightning.fabric.utilities import move_data_to_device

    from qwlit.data.batches import StepDataset, train_loader
    from qwlit.data.config import DataConfig
    from qwlit.data.encoding import RowEncoder
    from qwlit.data.order import Order
    from qwlit.data.step_plan import Limits, StepPlan
    from qwlit.data.store import build_store
    from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
    from qwlit.model.loss_model import build_loss_model

    encoder = RowEncoder(DataConfig(), case.vocab_size, None, None, None)
    store = build_store(str(folder / "samples.jsonl"), encoder, cache_root=folder / "cache")
    order = Order.plain(SEED, len(store))
    plan = StepPlan(store, order, case.global_batch_size, 1, Limits(max_samples=case.micro_batch_size), packing=True)
    kernel: Literal["varlen", "sdpa"] = "varlen" if case.on_cuda else "sdpa"
    frozen = torch.bfloat16 if case.on_cuda else torch.float32
    model = build_loss_model(
        ModelConfig(path=str(folder / "model")),
        AdapterConfig(kind="lora" if case.adapter else "none"),
        DropoutConfig(),
        FreezeConfig(),
        Execution(kernel, "none", frozen, frozen, compiled=case.on_cuda),
        seed=SEED,
    ).to(case.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=case.lr, weight_decay=0.0, fused=True)
    steps = StepDataset(store, plan, 0, pad_id=0)
    workers = 4 if case.on_cuda else 0
    losses, norms = [], []
    for batch in train_loader(
        steps, start_step=0, total_steps=case.steps, num_workers=workers, pin_memory=case.on_cuda
    ):
        loss_sum = torch.zeros((), device=case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled=case.on_cuda):
            for micro in batch.micro_batches:
                loss = model(move_data_to_device(micro, case.device)).loss_sum
                (loss / batch.num_supervised_tokens).backward()
                loss_sum += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        optimizer.grad_scale = norm.clamp(min=1.0)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / batch.num_supervised_tokens)
        norms.append(norm)
        record.step()
    record.losses, record.grad_norms = ([float(value) for value in values] for values in (losses, norms))
    record.how = {"precision": "bf16-mixed" if case.on_cuda else "32-true", "attention": kernel}
    record.how["compiled"] = case.on_cuda


ARMS: dict[str, Callable[[Case, Path, Record], None]] = {
    function.__name__: function
    for function in (
        *(qwlit, qwlit_auto, raw, hf, litgpt),
        *(trl, trl_best, trl_padding_free, trl_flash, trl_flash_liger, trl_liger, trl_compiled),
    )
}
PACKAGES = {"litgpt": ("litgpt",)} | dict.fromkeys(("trl_liger", "trl_flash_liger"), ("trl", "liger_kernel"))
"""The packages that an arm needs beside qwlit's own; all other arms of TRL need trl."""
ON_CUDA_ONLY = ("trl_flash", "trl_flash_liger", "trl_liger", "trl_compiled")


def why_not(arm: str, case: Case) -> str | None:
    """Return why an arm cannot do the work on this machine; None if it can."""
    needed = PACKAGES.get(arm, ("trl",) if arm.startswith("trl") else ())
    if lacking := [package for package in needed if find_spec(package) is None]:
        return f"not installed: {', '.join(lacking)}"
    if arm in ON_CUDA_ONLY and not case.on_cuda:
        return "needs a GPU"
    if arm.startswith("trl_flash") and flash_attention() is None:
        return "not installed: flash-attn-3, flash-attn or flash-attn-4"
    if arm == "litgpt" and (case.on_cuda or case.adapter):
        return "trains all weights, on CPU"
    return None


def main(arm: str, folder: str, out: str) -> None:
    place = Path(folder)
    case = read_case(place)
    record = Record(case)
    ARMS[arm](case, place, record)
    if len(record.ends) != case.steps:
        raise SystemExit(f"{arm} trained {len(record.ends)} steps, not {case.steps}")
    measured = {"losses": record.losses, "grad_norms": record.grad_norms}
    measured |= {"ends": record.ends, "device_peak": record.device_peak}
    Path(out).write_text(json.dumps(measured | {"how": record.how | settings()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
