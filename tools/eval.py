"""``detkit eval`` from a checkout: see detkit/tasks/eval.py and configs/eval.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("eval")
