"""``detkit import_weights`` from a checkout: see detkit/tasks/import_weights.py and configs/import_weights.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("import_weights")
