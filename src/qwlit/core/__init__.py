"""Errors, configuration types, devices, ranks and files: what every floor may use."""
