"""Qwen2 and Qwen2.5: biases on the projections of queries, keys and values."""

from qwlit.model.families.decoder import ModelFamily

FAMILY = ModelFamily("qwen2", "Qwen2")
