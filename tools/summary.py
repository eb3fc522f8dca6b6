"""``detkit summary`` from a checkout: detkit/tasks/summary.py does it, configs/summary.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("summary")
