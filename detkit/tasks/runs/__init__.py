"""Run directories: creating, locking and resuming them, and building what is trained in them."""
