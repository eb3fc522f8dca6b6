"""Write an image set in another format."""

from pathlib import Path
from typing import Any

from detkit.data.formats.writing import WriteResult, require_empty_dir, write_set
from detkit.data.read import read_splits
from detkit.registry import WRITERS
from detkit.tasks.common import tell_split, train_command
from detkit.viz.console import make_console


def run(cfg: dict[str, Any]) -> WriteResult:
    """Convert what ``cfg`` (configs/convert_data.yaml, resolved) names; print how to train on the result.

    Raises:
        DetkitError: the set cannot be read, or ``dst`` cannot be written or holds something.
    """
    console = make_console()
    folder = Path(str(cfg["dst"]))
    WRITERS.get(cfg["format"])
    require_empty_dir(folder)
    splits = read_splits(cfg["data"], console)
    for split, annotations in splits.items():
        tell_split(split, annotations, console)
    written = write_set(cfg["format"], splits, folder)
    for warning in written.warnings:
        console.print(f"mind: {warning}")
    console.print(f"{cfg['format']} written to {folder}; train on it: {train_command(written.data)}")
    return written
