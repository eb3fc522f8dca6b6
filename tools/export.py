"""``detkit export`` from a checkout: see detkit/tasks/export.py and configs/export.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("export")
