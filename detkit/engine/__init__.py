"""Training, evaluation and what they need: optimizer, moving average, precision, checkpoints, logs."""
