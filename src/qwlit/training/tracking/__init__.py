"""What a run records: its folder, manifest, metrics, determinism trace, progress on the screen, and W&B."""
