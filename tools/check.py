"""``detkit check`` from a checkout: detkit/tasks/check.py does it, configs/check.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("check")
