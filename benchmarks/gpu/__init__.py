"""One command that measures qwlit on a GPU, in parts: `python -m benchmarks.gpu list`."""
