"""Other people's trainers doing the same work."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import installed_version
from benchmarks.work import COMPARED, LORA, SEED, Case, Record, samples_in_order


def _callback(case: Case, record: Record) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            record.step()
            if case.on_cuda and len(record.ends) == COMPARED:
                state.logging_steps = case.steps + 1  # to log makes the host wait for the device

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                record.losses.append(float(logs["loss"]))
                record.grad_norms.append(float(logs["grad_norm"]))

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
        "use_cpu": not case.on_cuda,
        "bf16": case.on_cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 4 if case.on_cuda else 0,
    }


def _how(case: Case, trainer: Any) -> dict[str, object]:
    attention = trainer.model.config._attn_implementation
    precision = "bf16-mixed" if trainer.args.bf16 else "32-true"
    return {"precision": precision, "attention": attention, "compiled": bool(trainer.args.torch_compile)}


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
        callbacks=[_callback(case, record)],
    )
    trainer.train()
    record.how = _how(case, trainer)


def trl(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer as a user gets it."""
    _trl(case, folder, record, samples_in_order(folder))


def trl_best(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer with samples of like length side by side within each step, which is the same step."""
    _trl(case, folder, record, _by_length(case, folder))


def trl_padding_free(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer with samples laid end to end, and sdpa with a mask."""
    _trl(case, folder, record, samples_in_order(folder), padding_free=True)


def trl_flash(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer with samples laid end to end, and flash attention; CUDA only."""
    _trl(case, folder, record, samples_in_order(folder), attention=flash_attention(), padding_free=True)


def trl_flash_liger(case: Case, folder: Path, record: Record) -> None:
    """As trl_flash, with Liger's kernels; CUDA only."""
    rows = samples_in_order(folder)
    _trl(case, folder, record, rows, attention=flash_attention(), padding_free=True, use_liger_kernel=True)


def trl_liger(case: Case, folder: Path, record: Record) -> None:
    """As trl_best, with Liger's kernels; CUDA only."""
    _trl(case, folder, record, _by_length(case, folder), use_liger_kernel=True)


def trl_compiled(case: Case, folder: Path, record: Record) -> None:
    """As trl_best, with torch_compile; CUDA only."""
    _trl(case, folder, record, _by_length(case, folder), torch_compile=True)


def flash_attention() -> str | None:
    """Return transformers' name of the flash attention that is installed, the fastest on an H100 first."""
    names = {
        "flash-attn-3": "flash_attention_3",
        "flash-attn": "flash_attention_2",
        "flash-attn-4": "flash_attention_4",
    }
    return next((name for package, name in names.items() if installed_version(package)), None)


def _by_length(case: Case, folder: Path) -> list[dict[str, list[int]]]:
    rows, size = samples_in_order(folder), case.global_batch_size
    steps = (rows[start : start + size] for start in range(0, len(rows), size))
    return [row for step in steps for row in sorted(step, key=lambda row: -len(row["input_ids"]))]


def _trl(
    case: Case,
    folder: Path,
    record: Record,
    rows: list[dict[str, list[int]]],
    *,
    attention: str | None = None,
    **settings: Any,
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from qwlit.core.files import resolve_path

    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_path("qwlit:demo/tokenizer"))
    # Trained weights are float32 in every arm; a frozen base has bfloat16 on CUDA, as qwlit's has.
    loaded = {"dtype": "bfloat16" if case.adapter and case.on_cuda else "float32"}
    config = SFTConfig(
        **_arguments(case, folder),
        model_init_kwargs=loaded | ({"attn_implementation": attention} if attention else {}),
        max_length=None,
        gradient_checkpointing=False,
        **settings,
    )
    torch.manual_seed(SEED)
    trainer = _in_order(SFTTrainer)(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if case.adapter else None,
        callbacks=[_callback(case, record)],
    )
    trainer.train()
    record.how = _how(case, trainer)
