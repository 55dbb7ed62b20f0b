"""One training, from checked settings to its summary: assemble, begin, fit, finish."""
