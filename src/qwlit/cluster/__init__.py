"""Slurm: the job that trains a run, written from its settings."""
