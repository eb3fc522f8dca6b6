"""``detkit convert_data`` in a checkout: detkit/tasks/convert_data.py does it, configs/convert_data.yaml explains it."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("convert_data")
