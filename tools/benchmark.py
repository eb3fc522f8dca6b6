"""``detkit benchmark`` from a checkout: detkit/tasks/benchmark.py does it, configs/benchmark.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("benchmark")
