"""``detkit convert_data`` from a checkout: see detkit/tasks/convert_data.py and configs/convert_data.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("convert_data")
