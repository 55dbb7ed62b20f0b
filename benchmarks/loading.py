"""Host memory while two ranks load a sharded Qwen3-0.6B from a folder.

    python -m benchmarks.loading

A random folder of that shape in bfloat16 (1.2 GB) is made in a temporary place and deleted at the end. Linux only.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.machine import describe
from benchmarks.store import RESULTS, private_bytes
from qwlit.config.compose import compose
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.families import FAMILIES
from qwlit.model.load import fill_causal_lm
from qwlit.model.loss_model import build_loss_model
from qwlit.model.presets import to_hf_config
from qwlit.model.shard import shard_model

RANKS = 2


def make_folder(folder: Path) -> int:
    """Save the model and return its parameters."""
    architecture = compose(["model=qwen3_0_6b"]).config.model.architecture
    assert architecture is not None
    config = to_hf_config(architecture)
    _, model_class = FAMILIES[config.model_type].classes()
    torch.set_default_dtype(torch.bfloat16)
    model = model_class(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def load(rank: int, folder: Path, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    before, most, stop = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, private_bytes() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    config = ModelConfig(path=str(folder))
    model = build_loss_model(
        config,
        AdapterConfig(kind="none"),
        DropoutConfig(),
        FreezeConfig(),
        Execution("sdpa", "none", torch.float32, torch.float32),
        seed=0,
        leave_empty=True,
    )
    shard_model(model, mesh, bf16=False)
    fill_causal_lm(model.causal_lm, config, seed=0)
    torch.distributed.barrier()
    stop.set()
    watcher.join()
    queue.put((rank, most))
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    context = get_context("spawn")
    with context.Pool(1) as pool:
        parameters = pool.apply(make_folder, (folder,))
    queue = context.Queue()
    ranks = [context.Process(target=load, args=(rank, folder, queue)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    peaks = dict(queue.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    figures = {
        "parameters": parameters,
        "one_shard_gib": round(4 * parameters / RANKS / 2**30, 3),
        "peak_private_gib_of_each_rank": [round(peaks[rank] / 2**30, 3) for rank in range(RANKS)],
        **describe("torch", "transformers"),
    }
    (RESULTS / "loading.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp(prefix="qwlit-loading-"))
    try:
        main(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
