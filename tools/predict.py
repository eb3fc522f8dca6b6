"""``detkit predict`` from a checkout: see detkit/tasks/predict.py and configs/predict.yaml."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("predict")
