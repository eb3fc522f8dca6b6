"""Convert a data set to another format: ``detkit convert_data data=coco data.root=DIR format=yolo dst=DIR``."""

import logging
from pathlib import Path

from detkit.config.common import CommonConfig
from detkit.config.fields import Location, field, location
from detkit.config.schema import DataConfig
from detkit.data.formats.writing import WriteResult, require_empty_dir, write_set
from detkit.data.read import read_splits
from detkit.registry import WRITERS
from detkit.tasks.runs.data import log_split, train_command

logger = logging.getLogger(__name__)


class ConvertDataConfig(CommonConfig):
    """Keys of ``configs/convert_data.yaml``."""

    data: DataConfig
    dst: Location = location("new or empty folder in which to write the converted data set")
    format: str = field("format to convert to", "the name of a format")


def run(cfg: ConvertDataConfig) -> WriteResult:
    """Convert the data set of ``cfg`` (configs/convert_data.yaml, resolved); log the command that trains on it.

    Raises:
        DetkitError: the data set cannot be read, or ``dst`` cannot be written or is not empty.
    """
    folder = Path(str(cfg.dst))
    WRITERS.get(cfg.format)
    require_empty_dir(folder)
    splits = read_splits(cfg.data.as_dict())
    for split, annotations in splits.items():
        log_split(split, annotations)
    written = write_set(cfg.format, splits, folder)
    for warning in written.warnings:
        logger.warning("warning: %s", warning)
    logger.info("%s written to %s; train on it: %s", cfg.format, folder, train_command(written.data))
    return written
