"""List shapes, parameters, GFLOPs and milliseconds of every module: ``detkit summary model=yolov8n``."""

import contextlib
import logging

import torch

from detkit.config.common import MAX_CLASSES, Amp, ComposedConfig
from detkit.config.fields import field, whole
from detkit.models.detector import Detector, build_detector, build_meta_detector
from detkit.models.profiling import module_seconds
from detkit.models.summary import Row, add_times, print_summary, summarize
from detkit.ops.device import pick_device
from detkit.ops.precision import Precision, seed_everything
from detkit.tasks.runs.run_dir import model_name
from detkit.viz.console import make_console

logger = logging.getLogger(__name__)


class SummaryConfig(ComposedConfig):
    """Keys of ``configs/summary.yaml``."""

    num_classes: int = whole("number of classes", 1, MAX_CLASSES)
    depth: int = whole("nesting depth of the modules to list", 1)
    time: bool = field("measure the time of each module in the deployed (fused) network")
    amp: Amp = field("precision of the network that is timed; auto uses bf16 where the device supports it")
    rounds: int = whole("timed runs, of which the median is reported", 1)


def run(cfg: SummaryConfig) -> list[Row]:
    """Print and return the modules of the detector composed by ``cfg`` (configs/summary.yaml, resolved).

    Shapes, parameters and GFLOPs are those of the network as it is trained. They are counted on torch's meta device,
    without computing anything, unless a part of it needs values.

    Raises:
        DetkitError: the parts do not fit together.
    """
    class_names = [str(k) for k in range(cfg.num_classes)]
    precision = Precision.from_config(cfg.amp, pick_device(cfg.device))
    rows = None
    if (planned := build_meta_detector(cfg.as_dict(), class_names, copies=0)) is not None:
        with contextlib.suppress(NotImplementedError, RuntimeError):  # a part that needs values
            rows = summarize(planned, cfg.image_size, cfg.depth)
    if rows is None or cfg.time:
        seed_everything(cfg.seed)
        detector = build_detector(cfg.as_dict(), class_names, copies=3 if cfg.time else 1)
        detector = detector.to(precision.device)
        rows = rows or summarize(detector, cfg.image_size, cfg.depth)
    if cfg.time:
        rows = add_times(rows, _time(detector, cfg, precision))
    print_summary(rows, make_console())
    size = cfg.image_size
    logger.info("%s: one image of %dx%d pixels, %d classes.", model_name(cfg), size, size, cfg.num_classes)
    if cfg.time:
        logger.info("ms: of the fused network in %s on %s.", precision, precision.device)
    return rows


def _time(detector: Detector, cfg: SummaryConfig, precision: Precision) -> dict[str, float]:
    """Return the seconds of each module, as prediction runs it: deployed, channels-last, in the precision."""
    model = detector.fuse().as_model(cfg.amp)
    images = torch.rand(1, 3, cfg.image_size, cfg.image_size, device=precision.device)
    with torch.inference_mode(), precision.autocast():
        return module_seconds(model.detector, images.to(memory_format=torch.channels_last), cfg.rounds)
