"""Random samples, and the words of the command line that the parts which train with qwlit alone have in common."""

from pathlib import Path

from benchmarks.gpu.tables import Scale
from benchmarks.work import Case, write_samples


def common_words(folder: Path, scale: Scale, model: str, *, num_samples: int, mean_length: float) -> list[str]:
    """Write samples of log-normal lengths, 40 % of the tokens supervised, and return the words that train on them.

    Args:
        model: a preset; a toy has a small shape instead.
    """
    vocabulary = 520 if scale.toy else 151_936
    case = Case("samples", vocabulary, 0.4, steps=1, global_batch_size=num_samples, mean_length=mean_length)
    write_samples(case, folder)
    shape = [
        *("model=demo", "model.architecture.num_hidden_layers=2", "model.architecture.hidden_size=64"),
        *("model.architecture.intermediate_size=128",),
    ]
    return [
        *(shape if scale.toy else [f"model={model}", "model.hub_id=null", "model.init=random"]),
        *(f"data.path={folder}/samples.jsonl", f"hardware={'auto' if scale.device == 'cuda' else 'cpu'}"),
        *("train.max_epochs=null", "scheduler=constant", "scheduler.warmup_steps=0", "logging.every_steps=1"),
        *("checkpoint.each_epoch=false", "preflight.allow=[full_lr,full_lr_large,lr_range]"),
    ]
