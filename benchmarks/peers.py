"""Other people's trainers doing the same work."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.work import LORA, SEED, Case, Record, samples_in_order


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
        "use_cpu": not case.on_cuda,
        "bf16": case.on_cuda,
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


def trl_liger(case: Case, folder: Path, record: Record) -> None:
    """TRL's SFTTrainer, end to end, with Liger's kernels; CUDA only."""
    _trl(case, folder, record, samples_in_order(folder), padding_free=True, use_liger_kernel=True)


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


def litgpt(case: Case, folder: Path, record: Record) -> None:
    """LitGPT's finetune loop, with clipping; a step is one micro-batch, as it averages micro-batches of any content."""
    from lightning import Fabric
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import Alpaca
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.finetune.full import fit

    from qwlit.core.files import resolve_path

    if case.adapter:
        raise SystemExit("this arm trains all weights")
    fabric: Any = Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.seed_everything(SEED)
    fabric.log_dict = lambda metrics, step: record.step(metrics["loss"])
    model = fabric.setup(_litgpt_model(case, folder))
    adamw = torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.0, fused=True)
    adamw.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) and None)
    optimizer = fabric.setup_optimizers(adamw)
    rows = [_litgpt_row(**row) for row in samples_in_order(folder)]
    train, validation = (
        torch.utils.data.DataLoader(part, batch_size=case.global_batch_size, collate_fn=get_sft_collate_fn())
        for part in (rows, rows[:1])
    )
    fit(
        fabric=fabric,
        state={
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
            "iter_num": 0,
            "step_count": 0,
        },
        train_dataloader=train,
        val_dataloader=validation,
        devices=1,
        resume=False,
        checkpoint_dir=resolve_path("qwlit:demo/tokenizer"),
        out_dir=folder / "litgpt",
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=case.global_batch_size,
            micro_batch_size=case.global_batch_size,
            max_steps=case.steps,
            epochs=2,
        ),
        eval=EvalArgs(interval=case.steps + 1, initial_validation=False),
        data=Alpaca(),
    )


def _litgpt_model(case: Case, folder: Path) -> torch.nn.Module:
    """LitGPT's model with the weights of all arms, and the head tied as theirs is."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_3
    from safetensors.torch import load_file

    shape = case.architecture()
    config = Config(
        name="case",
        block_size=shape.max_position_embeddings,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        n_embd=shape.hidden_size,
        n_query_groups=shape.num_key_value_heads,
        head_size=shape.head_dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape.rms_norm_eps,
        norm_qk=True,
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape.intermediate_size,
        rope_base=int(shape.rope_theta),
    )
    weights = load_file(folder / "model" / "model.safetensors")
    converted: dict[str, torch.Tensor] = {}
    copy_weights_qwen_3(config, {}, converted, weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model = GPT(config)
    model.load_state_dict(converted)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def _litgpt_row(input_ids: list[int], labels: list[int]) -> dict[str, Any]:
    count = {"raw": len(input_ids), "raw_plus_prompt_template": len(input_ids)}
    return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels), "token_counts": count}
