"""TensorBoard, which every run writes: ``tensorboard --logdir runs``."""

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

PR_CURVES = 20  # of classes, beside the mean


class TensorBoard:
    """Writes events into the run directory.

    Args:
        step: of the run so far; what the events have of later ones does not count any more.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.run_dir = run_dir
        self.next_step: int | None = step + 1  # to be said once
        self.file: BinaryIO | None = None  # opened by the first call
        self.files = 0
        self.end: Summary | None = None  # of the session that the HParams tab shows

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._write([scalar(name, value) for name, value in values.items()], step)

    def image(self, name: str, path: Path, step: int) -> None:
        data = path.read_bytes()  # as it is: a PNG of photographs would be ten times as large
        with Image.open(path) as image:
            width, height = image.size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._write([Summary(value=[Summary.Value(tag=f"pictures/{name}", image=picture)])], step)

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
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
        summary = as_text(name, text)
        summary.value[0].tag = f"run/{name}"  # without the ending that torch gives it
        self._write([summary], 0)

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        # Not SummaryWriter.add_hparams, which writes into a folder of its own within the run's. Without torch's list of
        # parameters and metrics, the tab makes its own of all runs: first what differs, and the first scalars, "best/".
        _, start, self.end = hparams(dict(values), {})
        self._write([start], 0)

    def close(self, finished: bool) -> None:
        if finished and self.end is not None:
            self._write([self.end], 0)
        if self.file is not None:
            self.file.close()

    def _write(self, summaries: Iterable[Summary], step: int) -> None:
        """Write to the disk, before a state is saved that counts this step as done."""
        try:
            file = self._open() if self.file is None else self.file
            for summary in summaries:
                _append(file, Event(wall_time=time.time(), step=step, summary=summary))
        except OSError:
            self.file = None  # half a record ends it; the next call begins another
            raise

    def _open(self) -> BinaryIO:
        """Begin a file, as SummaryWriter does; that one writes in a thread, where an error is a traceback."""
        now, self.files = time.time(), self.files + 1
        name = f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{os.getpid()}.{self.files}"
        file = self.file = open(self.run_dir / name, "wb", buffering=0)  # noqa: SIM115
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
