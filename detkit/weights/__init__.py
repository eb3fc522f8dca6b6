"""Checkpoints of other projects: reading them without running anything, and telling what they are."""
