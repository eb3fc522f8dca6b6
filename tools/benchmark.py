"""``detkit benchmark`` from a checkout: see detkit/tasks/benchmark.py and configs/benchmark.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("benchmark")
