"""Qwen3 (dense): norms on the queries and keys of each head, no biases."""

from qwlit.model.families.decoder import ModelFamily

FAMILY = ModelFamily("qwen3", "Qwen3", query_norm="q_norm", key_norm="k_norm")
