"""One trainer doing the work, in a process of its own: `python -m benchmarks.arms ARM FOLDER OUT`.

Each arm writes the loss and the end of every step, in seconds. What a step costs is measured from the end of the first
to the end of the last, so that loading, compiling and warming up do not count.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.work import LORA, SEED, Case, read_case, samples_in_order


class Record:
    """Losses and the clock."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []

    def step(self, loss: float | None = None) -> None:
        self.ends.append(time.perf_counter())
        if loss is not None:
            self.losses.append(loss)


def qwlit(case: Case, folder: Path, record: Record) -> None:
    """The command line, as a user types it."""
    from lightning.pytorch.callbacks import Callback

    from qwlit.commands.train import main
    from qwlit.training import loop

    class Clock(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            record.step()

    build = loop.build_trainer

    def with_clock(*args: Any, callbacks: list[Callback], **kwargs: Any) -> Any:
        return build(*args, callbacks=[*callbacks, Clock()], **kwargs)

    loop.build_trainer = with_clock
    words = [
        *(f"model.path={folder}/model", f"data.path={folder}/samples.jsonl", f"run.root={folder}/runs"),
        *(
            "run.name=qwlit",
            "run.overwrite=true",
            "hardware=cpu",
            f"seed={SEED}",
            "dropout=none",
            "logging.every_steps=1",
        ),
        *(f"train.max_steps={case.steps}", f"train.global_batch_size={case.global_batch_size}"),
        *(f"hardware.micro_batch_size={case.micro_batch_size}", f"optim.lr={case.lr}", "optim.weight_decay=0"),
        *("scheduler=constant", "scheduler.warmup_steps=0", f"recipe={'lora' if case.adapter else 'full_sft'}"),
        *("scheduler=constant", "dropout=none"),
    ]
    main(words)
    rows = (folder / "runs" / "qwlit" / "metrics.jsonl").read_text().splitlines()
    record.losses = [row["train/loss"] for row in map(json.loads, rows) if "train/loss" in row]


def raw(case: Case, folder: Path, record: Record) -> None:
    """A plain torch loop over qwlit's own modules: what Lightning and everything around the step cost."""
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
    plan = StepPlan(store, order, case.global_batch_size, 1, Limits(rows=case.micro_batch_size), packing=True)
    model = build_loss_model(
        ModelConfig(path=str(folder / "model")),
        AdapterConfig(kind="lora" if case.adapter else "none"),
        DropoutConfig(),
        FreezeConfig(),
        Execution("sdpa", "none", torch.float32, torch.float32),
        seed=SEED,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=case.lr, weight_decay=0.0, fused=True)
    steps = StepDataset(store, plan, 0, pad_id=0)
    for batch in train_loader(steps, start_step=0, total_steps=case.steps, num_workers=0, pin_memory=False):
        loss_sum = torch.zeros(())
        for micro in batch.micro_batches:
            loss = model(micro).loss_sum
            (loss / batch.num_supervised_tokens).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        optimizer.grad_scale = norm.clamp(min=1.0)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        record.step(float(loss_sum) / batch.num_supervised_tokens)


def _callback(record: Record) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            record.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                record.losses.append(float(logs["loss"]))

    return Clock()


def _arguments(case: Case, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": case.steps,
        "per_device_train_batch_size": case.micro_batch_size,
        "gradient_accumulation_steps": case.global_batch_size // case.micro_batch_size,
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def _in_order(trainer_class: type[Any]) -> type[Any]:
    """The trainer, with the samples in the order in which all arms take them."""

    class InOrder(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return InOrder


def hf(case: Case, folder: Path, record: Record) -> None:
    """Transformers' Trainer, rows padded to the longest of a micro-batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if case.adapter:
        torch.manual_seed(SEED)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def column(name: str, filling: int) -> torch.Tensor:
            return torch.tensor([row[name] + [filling] * (width - len(row[name])) for row in rows])

        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        mask = (torch.arange(width) < lengths).long()
        return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}

    trainer = _in_order(Trainer)(
        model=model,
        args=TrainingArguments(**_arguments(case, folder)),
        train_dataset=samples_in_order(folder),
        data_collator=padded,
        callbacks=[_callback(record)],
    )
    trainer.train()


def trl(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer as a user gets it."""
    _trl(case, folder, record, samples_in_order(folder))


def trl_best(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer with samples of like length side by side within each step, which is the same step."""
    rows, size = samples_in_order(folder), case.global_batch_size
    steps = (rows[start : start + size] for start in range(0, len(rows), size))
    _trl(case, folder, record, [row for step in steps for row in sorted(step, key=lambda row: -len(row["input_ids"]))])


def trl_padding_free(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer with samples laid end to end."""
    _trl(case, folder, record, samples_in_order(folder), padding_free=True)


def _trl(case: Case, folder: Path, record: Record, rows: list[dict[str, list[int]]], **settings: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from qwlit.core.files import resolve_path

    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_path("qwlit:demo/tokenizer"))
    config = SFTConfig(
        **_arguments(case, folder),
        model_init_kwargs={"dtype": "float32"},
        max_length=None,
        gradient_checkpointing=False,
        **settings,
    )
    torch.manual_seed(SEED)
    _in_order(SFTTrainer)(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if case.adapter else None,
        callbacks=[_callback(record)],
    ).train()


ARMS: dict[str, Callable[[Case, Path, Record], None]] = {
    function.__name__: function for function in (qwlit, raw, hf, trl, trl_best, trl_padding_free)
}


def main(arm: str, folder: str, out: str) -> None:
    record, place = Record(), Path(folder)
    case = read_case(place)
    ARMS[arm](case, place, record)
    Path(out).write_text(json.dumps({"losses": record.losses, "ends": record.ends}))


if __name__ == "__main__":
    main(*sys.argv[1:])
