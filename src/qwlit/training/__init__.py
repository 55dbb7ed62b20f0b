"""The Lightning module and trainer, the run folder, checkpoints, and one callback per concern."""
