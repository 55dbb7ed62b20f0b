"""Turn a RunConfig into a RunPlan: before training, resolve once what depends on machine, model and data."""
