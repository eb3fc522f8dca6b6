"""``detkit convert_data``: detkit/tasks/convert_data.py does it, configs/convert_data.yaml has its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("convert_data")
