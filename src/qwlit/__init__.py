"""qwlit: fine-tune Qwen2 and Qwen3 models on Lightning."""

__version__ = "0.1.0"
