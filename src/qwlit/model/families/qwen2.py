"""Qwen2 and Qwen2.5: biases on the projections of queries, keys and values."""

from qwlit.model.families.decoder import ModelFamily

QWEN2 = ModelFamily("qwen2", "Qwen2")
