"""Plumbing of training programs: the run, its checkpoints, the optimizer, losses, and validation."""
