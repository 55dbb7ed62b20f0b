"""What a run records: run folder, manifest, determinism trace, progress display, and W&B."""
