"""From data files to optimizer steps: sources, rows, templates, store, step plan, batches."""
