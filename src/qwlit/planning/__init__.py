"""From a RunConfig to a RunPlan: what depends on machine, model and data, resolved once, before anything is trained."""
