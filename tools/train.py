"""``detkit train`` from a checkout: see detkit/tasks/train.py and configs/train.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("train")
