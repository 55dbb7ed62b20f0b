"""Use a trained model: generate answers, export it."""
