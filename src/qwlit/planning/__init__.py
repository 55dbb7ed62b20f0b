"""From a RunConfig to a RunPlan: resolve once, before training, everything that depends on machine, model and data."""
