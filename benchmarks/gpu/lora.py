"""Qwen3-0.6B, LoRA on every linear layer: qwlit's command line against TRL at its best on the same work.

The same weights, samples, steps, AdamW and clipping; float32 trained weights under bfloat16 autocast in every arm. An
arm whose first ten losses or whose first gradient's norm are not qwlit's does other work, and its row says so.
"""

from benchmarks.gpu.tables import Scale, Tables
from benchmarks.gpu.trainers import measure_case


def measure(tables: Tables, scale: Scale) -> None:
    measure_case(tables, scale, adapter=True)
