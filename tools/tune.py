"""``detkit tune`` from a checkout: see detkit/tasks/tune.py and configs/tune.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("tune")
