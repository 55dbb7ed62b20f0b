"""Measurements, each one documented command; figures with versions and device lie in results/."""
