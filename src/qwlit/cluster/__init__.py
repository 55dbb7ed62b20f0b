"""Slurm: write the batch file of a run from its settings."""
