"""Compare two checkpoints, or a checkpoint and a model in memory."""
