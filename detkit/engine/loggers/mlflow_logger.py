"""MLflow logger, enabled by ``trainer.loggers=[mlflow]``."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from detkit.engine.loggers.base import Value, tag
from detkit.ops.curves import RECALLS, Curves

MAX_PARAMS = 100  # parameters per request
MAX_CHARACTERS = 500  # length of a parameter that every server accepts


class MLflow:
    """Logs to experiment MLFLOW_EXPERIMENT_NAME (``detkit``) at MLFLOW_TRACKING_URI (``./mlruns``).

    Args:
        run_dir: run directory; its name is the name of the run.
        run: earlier ``id`` for the run directory; None for a new run.

    Attributes:
        id: id of the run in MLflow.

    Raises:
        MlflowException: the server does not respond.
    """

    def __init__(self, run_dir: Path, run: str | None) -> None:
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # otherwise ./mlruns is rejected in favor of a database
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the default, 7, takes minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").resolve().as_uri())
        self.known: set[str] = set()  # parameters logged before; they are immutable
        if run is not None:
            with suppress(MlflowException):  # run deleted, or at another tracking URI
                self.known = {*self.client.get_run(run).data.params}
                self.client.update_run(run, status="RUNNING")
                self.id = run
                return
        self.id = self.client.create_run(self._experiment(), run_name=run_dir.name).info.run_id

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "detkit")
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:  # otherwise, another run of a sweep has just created it
                    raise
        return found.experiment_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by name."""
        now = round(1000 * time.time())
        finite = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        self.client.log_batch(self.id, metrics=finite)

    def image(self, name: str, path: Path, step: int) -> None:  # noqa: ARG002
        """Log an image file, replacing the previous one of that name."""
        self.client.log_artifact(self.id, str(path), "plots")

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Log precision-recall curves of the classes."""
        classes = {tag(class_names[c]): curves.precision_rc[:, c].tolist() for c in curves.labelled()}
        content = {"step": step, "iou": 0.5, "recall": RECALLS.tolist(), "precision": classes}
        self.client.log_dict(self.id, content, "plots/precision_recall.json")

    def text(self, name: str, text: str) -> None:
        """Log a Markdown text."""
        self.client.log_text(self.id, text, f"{name}.md")

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        """Log the hyperparameters of the run."""
        new = [Param(name, str(value)[:MAX_CHARACTERS]) for name, value in values.items() if name not in self.known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.id, params=new[start : start + MAX_PARAMS])

    def close(self, finished: bool) -> None:
        """End the run, as killed if it was interrupted."""
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")
