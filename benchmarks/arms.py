"""One trainer doing the work, in a process of its own: `python -m benchmarks.arms ARM FOLDER OUT`.

Each arm writes the loss and the end of every step, in seconds. What a step costs is measured from the end of the first
to the end of the last, so that loading, compiling and warming up do not count.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.peers import hf, litgpt, trl, trl_best, trl_liger, trl_padding_free
from benchmarks.work import SEED, Case, Record, read_case


def qwlit(case: Case, folder: Path, record: Record) -> None:
    """The command line, as a user types it."""
    from lightning.pytorch.callbacks import Callback

    from qwlit.commands.train import main
    from qwlit.run import callbacks as run_callbacks

    class Clock(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            record.step()

    build = run_callbacks.build_trainer

    def with_clock(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
        # First, so that the last step ends before its checkpoint, which the other arms do not write.
        return build(*args, callbacks=[Clock(), *callbacks], **kwargs)

    run_callbacks.build_trainer = with_clock
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
        *(f"hardware.micro_batch_size={case.micro_batch_size}", f"optim.lr={case.lr}", "optim.weight_decay=0"),
        *("scheduler=constant", "scheduler.warmup_steps=0", f"recipe={'lora' if case.adapter else 'full_sft'}"),
        *("dropout=none", "preflight.allow=[full_lr]"),
    ]
    main(words)
    rows = (folder / "runs" / "qwlit" / "metrics.jsonl").read_text().splitlines()
    record.losses = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]


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
    losses = []
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
        record.step()
    record.losses = [float(loss) for loss in losses]


ARMS: dict[str, Callable[[Case, Path, Record], None]] = {
    function.__name__: function for function in (qwlit, raw, hf, trl, trl_best, trl_padding_free, trl_liger, litgpt)
}


def main(arm: str, folder: str, out: str) -> None:
    place = Path(folder)
    case = read_case(place)
    record = Record(case)
    ARMS[arm](case, place, record)
    if len(record.ends) != case.steps:
        raise SystemExit(f"{arm} trained {len(record.ends)} steps, not {case.steps}")
    peak = torch.cuda.max_memory_allocated() if case.on_cuda else None
    Path(out).write_text(json.dumps({"losses": record.losses, "ends": record.ends, "device_peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
