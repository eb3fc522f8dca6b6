"""``detkit summary`` from a checkout: see detkit/tasks/summary.py and configs/summary.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("summary")
