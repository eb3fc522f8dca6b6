"""``detkit check_data`` from a checkout: see detkit/tasks/check_data.py and configs/check_data.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("check_data")
