"""Checkpoints: written at step boundaries, with a checksum for each file; read whole or by shard slice."""
