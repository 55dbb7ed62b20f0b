"""TrainingRun: lock the run folder, start or resume, fit, export, and write the summary."""
