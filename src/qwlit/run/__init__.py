"""One training, from its plan to its summary: lock the run folder, resume, fit, finish."""
