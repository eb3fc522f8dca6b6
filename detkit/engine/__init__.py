"""Training and evaluation: optimizer, EMA, precision, checkpoints, logging."""
