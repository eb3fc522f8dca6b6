"""MLflow, by ``trainer.loggers=[mlflow]``."""

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

BATCH = 100  # parameters of one request, at most
LONGEST = 500  # characters of a parameter that every server takes


class MLflow:
    """Writes to a run of the experiment MLFLOW_EXPERIMENT_NAME, or ``detkit``, at MLFLOW_TRACKING_URI, or ``./mlruns``.

    Args:
        run: the ``id`` that the run directory had before; None for a new one.

    Attributes:
        id: by which MLflow knows the run.

    Raises:
        MlflowException: the server does not answer.
    """

    def __init__(self, run_dir: Path, run: str | None) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else ./mlruns is refused in favour of a database
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # seven take minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").resolve().as_uri())
        self.known: set[str] = set()  # parameters, which MLflow does not let change
        if run is not None:
            with suppress(MlflowException):  # of another tracking URI, or deleted
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
                if found is None:  # else another run of a sweep has just made it
                    raise
        return found.experiment_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = round(1000 * time.time())
        finite = [Metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        self.client.log_batch(self.id, metrics=finite)

    def image(self, name: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.id, str(path), "plots")  # the latest of its name

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        classes = {tag(class_names[c]): curves.precision_rc[:, c].tolist() for c in curves.labelled()}
        content = {"step": step, "iou": 0.5, "recall": RECALLS.tolist(), "precision": classes}
        self.client.log_dict(self.id, content, "plots/precision_recall.json")

    def text(self, name: str, text: str) -> None:
        self.client.log_text(self.id, text, f"{name}.md")

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        new = [Param(name, str(value)[:LONGEST]) for name, value in values.items() if name not in self.known]
        for start in range(0, len(new), BATCH):
            self.client.log_batch(self.id, params=new[start : start + BATCH])

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")
