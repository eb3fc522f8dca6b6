"""Checkpoints of other projects: reading them without executing code, and identifying the model."""
