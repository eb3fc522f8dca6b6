"""``detkit eval`` from a checkout: detkit/tasks/eval.py does it, configs/eval.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("eval")
