"""Shared code of the training programs: the run, checkpoints, optimizer, losses and validation."""
