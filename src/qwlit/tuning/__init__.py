"""Search for settings with one sweep file, run by W&B's agents or by Optuna on this machine."""
