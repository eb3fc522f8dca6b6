"""``detkit train`` from a checkout: detkit/tasks/train.py does it, configs/train.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("train")
