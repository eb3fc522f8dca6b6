"""What a trial may run beside commands, in the server's children: server.py finds it beside itself."""

import sys
import time

import numpy as np


def load(*overrides: str) -> None:
    """Read the training split that the overrides name, and decode all of its images; as ``train`` does, but sooner.

    Raises:
        AssertionError: a box is not finite or has no area, or there are more images than were read.
        SystemExit: with status 2 and a sentence, on a mistake in the files.
    """
    from detkit.config import compose_config, resolve
    from detkit.data.dataset import DetectionDataset, LetterboxDataset
    from detkit.data.loader import BatchLoader
    from detkit.data.read import read_split
    from detkit.errors import DetkitError

    try:
        annotations = read_split(resolve(compose_config("train", list(overrides)))["data"], "train")
        assert np.isfinite(annotations.boxes).all()
        assert (annotations.boxes[:, 2:] > annotations.boxes[:, :2]).all()
        loader = BatchLoader(LetterboxDataset(DetectionDataset(annotations), 64), 2, workers=0)
        assert sum(len(batch.images) for batch in loader.epoch(0)) <= len(annotations)
    except DetkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def misbehave(how: str) -> None:
    """Wait for ever, fill the memory, fail, or else print ``how`` and end with status 2."""
    if how == "wait":
        time.sleep(3600)
    if how == "fill":
        bytearray(2**36)
    if how == "fail":
        raise KeyError(how)
    print(how, file=sys.stderr)
    sys.exit(2)
