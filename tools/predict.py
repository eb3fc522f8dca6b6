"""``detkit predict`` from a checkout: detkit/tasks/predict.py does it, configs/predict.yaml holds its keys."""

from detkit.cli import launch

if __name__ == "__main__":
    launch("predict")
