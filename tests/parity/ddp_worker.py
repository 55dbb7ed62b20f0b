"""One rank of passes under DDP, with layers as they are written and compiled.

Started by test_compile.py as `python -m tests.parity.ddp_worker OUT RANK` with the ranks' environment set. Saves the
gradients of both, and how many graphs the compiler's backend was given for the compiled ones.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from qwlit.core.ranks import end_process, mark_process_group_joined
from qwlit.model.compile import compile_layers
from qwlit.model.config import AdapterConfig, DropoutConfig, Execution, FreezeConfig, ModelConfig
from qwlit.model.loss_model import LossModel, build_loss_model
from tests.parity.varlen import register
from tests.tiny import packed, random_samples, tiny_architecture

RANKS = 2
# A layer has 2.4 MB of gradients: more than DDP's first bucket, at which dynamo would cut it.
WIDTH, INNER = 256, 512


def gradients(backend: CompileCounterWithBackend | None, rank: int) -> dict[str, torch.Tensor]:
    wide = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "head_dim": 64}
    architecture = replace(tiny_architecture(), **wide)
    model = build_loss_model(
        ModelConfig(init="random", architecture=architecture),
        AdapterConfig(),
        DropoutConfig(),
        FreezeConfig(),
        Execution("varlen", "none", torch.float32, torch.float32),
        seed=0,
    )
    if backend is not None:
        compile_layers(model.causal_lm, backend=backend)  # type: ignore[arg-type]
    replicated = DistributedDataParallel(model, broadcast_buffers=False, bucket_cap_mb=1)
    for number, lengths in enumerate(([9, 14, 5], [30, 2])):
        micro = packed(random_samples(lengths, seed=2 * number + rank))
        replicated(micro).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def main(out: Path, rank: int) -> None:
    register()
    LossModel._kernel = lambda *_: "varlen"  # type: ignore[method-assign, assignment]
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    backend = CompileCounterWithBackend("eager")
    torch.save((gradients(None, rank), gradients(backend, rank), backend.frame_count), out / str(rank))
    dist.barrier()
    dist.destroy_process_group()
    mark_process_group_joined()
    end_process(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
