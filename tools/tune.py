"""``detkit tune`` from a checkout: detkit/tasks/tune.py does it, configs/tune.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("tune")
