"""TensorBoard logger, which every run uses: ``tensorboard --logdir runs``."""

import io
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, pr_curve_raw, scalar
from torch.utils.tensorboard.summary import text as as_text

from detkit.engine.loggers.base import Value, tag
from detkit.ops.curves import THRESHOLDS, Curves

PR_CURVES = 20  # classes with a curve, besides the mean


class TensorBoard:
    """Writes events to the run directory.

    Args:
        run_dir: run directory.
        step: number of batches so far; earlier events with a later step are discarded by TensorBoard.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.run_dir = run_dir
        self.next_step: int | None = step + 1  # written once, to the first file
        self.file: BinaryIO | None = None  # opened by the first call
        self.files = 0
        self.end: Summary | None = None  # end of the session in the HParams tab

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by name."""
        self._write([scalar(name, value) for name, value in values.items()], step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file without re-encoding it."""
        data = path.read_bytes()
        with Image.open(path) as image:
            width, height = image.size
        summary = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._write([Summary(value=[Summary.Value(tag=f"images/{name}", image=summary)])], step)

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Log precision-recall curves of the classes with the most boxes, and their mean."""
        precision_tc, recall_tc = curves.at_thresholds()
        hits_tc = recall_tc * curves.boxes_c
        false_tc = hits_tc * (1 / np.maximum(precision_tc, 1e-9) - 1)
        columns = {tag(class_names[c]): [c] for c in curves.labelled(PR_CURVES)}
        drawn: list[Summary] = []
        for name, classes in {"all": curves.labelled(), **columns}.items():
            if classes:
                precision, recall = (values[:, classes].mean(1) for values in (precision_tc, recall_tc))
                hits, false = (values[:, classes].sum(1) for values in (hits_tc, false_tc))
                counts = (hits, false, np.zeros_like(hits), curves.boxes_c[classes].sum() - hits)
                points = (*counts, precision, recall, len(THRESHOLDS))
                drawn.append(pr_curve_raw(f"precision_recall/{name}", *points))
        self._write(drawn, step)

    def text(self, name: str, text: str) -> None:
        """Log a Markdown text."""
        summary = as_text(name, text)
        summary.value[0].tag = f"run/{name}"  # without torch's suffix
        self._write([summary], 0)

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        """Log the hyperparameters of the run."""
        # Not SummaryWriter.add_hparams, which writes to a subfolder. Without torch's list of parameters and metrics,
        # the HParams tab lists those of all runs: differing parameters and the first scalars ("best/") come first.
        _, start, self.end = hparams(dict(values), {})
        self._write([start], 0)

    def close(self, finished: bool) -> None:
        """Close the event file; end the session if the run has finished."""
        if finished and self.end is not None:
            self._write([self.end], 0)
        if self.file is not None:
            self.file.close()

    def _write(self, summaries: Iterable[Summary], step: int) -> None:
        """Write events to disk at once, before a training state with this step is saved."""
        try:
            file = self._open() if self.file is None else self.file
            for summary in summaries:
                _append(file, Event(wall_time=time.time(), step=step, summary=summary))
        except OSError:
            self.file = None  # it may end with a partial record: the next call opens a new file
            raise

    def _open(self) -> BinaryIO:
        """Open a new event file, not with SummaryWriter, as errors in its thread cannot be handled."""
        now, self.files = time.time(), self.files + 1
        name = f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{os.getpid()}.{self.files}"
        file = self.file = (self.run_dir / name).open("wb", buffering=0)
        _append(file, Event(wall_time=now, file_version="brain.Event:2"))
        if self.next_step is not None:
            session = SessionLog(status=SessionLog.START)
            _append(file, Event(wall_time=now, step=self.next_step, session_log=session))
            self.next_step = None
        return file


def _append(file: BinaryIO, event: Event) -> None:
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    rest = record.getbuffer()
    while rest:
        rest = rest[file.write(rest) :]
