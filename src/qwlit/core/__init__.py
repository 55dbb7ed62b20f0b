"""Errors, configuration types, devices, ranks, signals and files: every other package may import from here."""
