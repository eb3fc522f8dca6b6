"""``detkit check`` from a checkout: see detkit/tasks/check.py and configs/check.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("check")
