"""LitGPT's trainer doing the same work."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.work import SEED, Case, Record, samples_in_order


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
