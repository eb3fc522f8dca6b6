"""``detkit check_data`` from a checkout: detkit/tasks/check_data.py does it, configs/check_data.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("check_data")
