"""List shapes, parameters and GFLOPs of every module: ``detkit summary model=yolov8n``."""

import contextlib
import logging

from detkit.config.common import MAX_CLASSES, ComposedConfig
from detkit.config.fields import whole
from detkit.models.detector import build_detector, build_meta_detector
from detkit.models.summary import Row, print_summary, summarize
from detkit.ops.device import pick_device
from detkit.tasks.runs.run_dir import model_name
from detkit.viz.console import make_console

logger = logging.getLogger(__name__)


class SummaryConfig(ComposedConfig):
    """Keys of ``configs/summary.yaml``."""

    num_classes: int = whole("number of classes", 1, MAX_CLASSES)
    depth: int = whole("nesting depth of the modules to list", 1)


def run(cfg: SummaryConfig) -> list[Row]:
    """Print and return the modules of the detector composed by ``cfg`` (configs/summary.yaml, resolved).

    The detector runs on torch's meta device, without computing anything, unless a part of it needs values.

    Raises:
        DetkitError: the parts do not fit together.
    """
    class_names = [str(k) for k in range(cfg.num_classes)]
    rows = None
    if (planned := build_meta_detector(cfg.as_dict(), class_names, copies=0)) is not None:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a part that needs values
            rows = summarize(planned, cfg.image_size, cfg.depth)
    if rows is None:
        detector = build_detector(cfg.as_dict(), class_names).to(pick_device(cfg.device))
        rows = summarize(detector, cfg.image_size, cfg.depth)
    print_summary(rows, make_console())
    size = cfg.image_size
    logger.info("%s: one image of %dx%d pixels, %d classes.", model_name(cfg), size, size, cfg.num_classes)
    return rows
