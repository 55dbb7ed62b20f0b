"""From a Qwen2/Qwen3 configuration to a loss: presets, loading, attention, dropout, adapters, head."""
