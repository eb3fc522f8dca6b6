"""Training runs: creating, locking and resuming their directories, and building data, model and training step."""
