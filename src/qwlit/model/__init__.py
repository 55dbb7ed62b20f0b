"""The model, from a Qwen2 or Qwen3 configuration to the loss: loading, attention, dropout, adapters, head."""
