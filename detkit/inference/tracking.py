"""Tracking of objects through the frames of a video, by the package ``trackers``."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from detkit.errors import DetkitError
from detkit.structures import Detections

TRACKERS = {"bytetrack": "ByteTrackTracker", "sort": "SORTTracker", "ocsort": "OCSORTTracker"}
SETTINGS = {  # where the package's defaults, for detectors of pedestrians, are too strict: 0.6 and 0.7
    "bytetrack": {"high_conf_det_threshold": 0.4, "track_activation_threshold": 0.4},
    "ocsort": {"high_conf_det_threshold": 0.4},
}
FPS = 30.0  # where a video does not state its own


class Tracker:
    """Gives objects ids that they keep from frame to frame.

    Args:
        name: bytetrack, sort or ocsort.
        fps: frame rate of the video, which decides for how many frames a lost object is searched; None: 30.

    Raises:
        DetkitError: the name is unknown, or the package ``trackers`` is not installed.
    """

    def __init__(self, name: str, fps: float | None = None) -> None:
        if name not in TRACKERS:
            raise DetkitError(f"track={name} must be one of {', '.join(TRACKERS)}")
        try:
            trackers = importlib.import_module("trackers")
        except ImportError as error:
            raise DetkitError(f"track={name} needs trackers: pip install 'detkit[track]' ({error})") from None
        self.tracker: Any = getattr(trackers, TRACKERS[name])(frame_rate=fps or FPS, **SETTINGS.get(name, {}))

    def update(self, found: Detections) -> Detections:
        """Return the detections of the next frame with their ``tracks``: an id, or -1 if an object has none yet."""
        detections = found.to_supervision()
        detections.data = {"index": np.arange(len(found))}  # trackers change the order
        tracked = self.tracker.update(detections)
        tracks = torch.full((len(found),), -1, dtype=torch.int64)
        if len(tracked):
            tracks[torch.as_tensor(tracked.data["index"])] = torch.as_tensor(tracked.tracker_id, dtype=torch.int64)
        return replace(found, tracks=tracks)
