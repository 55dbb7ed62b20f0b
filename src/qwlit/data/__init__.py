"""From files to optimizer steps: sources, templates, store, step plan, batches."""
