"""Annotated videos: the frames of a source with boxes, and the trails of tracked objects."""

import errno
from collections import deque
from pathlib import Path

import cv2
import numpy as np

from detkit.inference.frames import Frame
from detkit.structures import Detections
from detkit.viz.drawing import draw_boxes

FPS = 25.0  # of a stream that does not state its own
TRAIL = 40  # frames whose positions are drawn as a trail
CODEC = "mp4v"


class VideoFile:
    """An MP4 file, written under a temporary name and renamed by ``close``.

    Args:
        path: file to write.
        fps: frames per second.
        size: (height, width) of the first frame, to which others are resized; an odd side loses its last pixel, as
            the codec requires.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self.path, self.size = path, size
        path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = path.with_name(f".{path.stem}.tmp.mp4")
        self.temporary.unlink(missing_ok=True)
        self.count = 0
        self.writer = cv2.VideoWriter(
            str(self.temporary), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*CODEC), fps, (size[1], size[0])
        )
        if not self.writer.isOpened():
            raise OSError(errno.EIO, "OpenCV cannot open it for writing", str(path))

    def write(self, image: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 RGB."""
        if image.shape[:2] != self.size:
            image = cv2.resize(image, self.size[::-1])
        self.writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        """Finish the file.

        Raises:
            OSError: it is incomplete, as on a full disk, which OpenCV does not report.
        """
        self.writer.release()
        written = cv2.VideoCapture(str(self.temporary), cv2.CAP_FFMPEG)
        count = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.release()
        if count < self.count:
            self.temporary.unlink(missing_ok=True)
            raise OSError(errno.EIO, f"only {count} of {self.count} frames were written", str(self.path))
        self.temporary.replace(self.path)


class AnnotatedVideos:
    """Writes one annotated video for each video of a source, one after the other."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.video: VideoFile | None = None
        self.trails: dict[int, deque[tuple[float, float]]] = {}
        self.last_seen: dict[int, int] = {}  # frame in which a track was found last

    def write(self, path: Path, frame: Frame, found: Detections) -> None:
        """Append a frame to the video ``path``; if that is another one than before, finish the one before.

        Raises:
            OSError: a video cannot be written; for one that cannot be opened, only at its first frame.
        """
        assert frame.image is not None
        if path != self.path:
            try:
                self.close()
            finally:  # if the one before is incomplete, this one is written all the same
                self.path = path
                self.video = VideoFile(path, frame.fps or FPS, found.size)
                self.video.write(self._draw(frame.image, found))
            return
        if self.video is not None:
            self.video.write(self._draw(frame.image, found))

    def close(self) -> None:
        """Finish the current video."""
        video, self.video, self.path = self.video, None, None
        self.trails, self.last_seen = {}, {}
        if video is not None:
            video.close()

    def _draw(self, image: np.ndarray, found: Detections) -> np.ndarray:
        boxes, labels, scores = found.boxes.numpy(), found.labels.tolist(), found.scores.tolist()
        if found.tracks is None:
            return draw_boxes(image, boxes, labels, found.class_names, scores)
        tracks, frame = found.tracks.tolist(), found.frame or 0
        for track, (x1, y1, x2, y2) in zip(tracks, boxes.tolist(), strict=True):
            if track >= 0:
                self.trails.setdefault(track, deque(maxlen=TRAIL)).append(((x1 + x2) / 2, (y1 + y2) / 2))
                self.last_seen[track] = frame
        for track in [track for track, seen in self.last_seen.items() if frame - seen > TRAIL]:
            del self.trails[track], self.last_seen[track]
        trails = {track: points for track, points in self.trails.items() if len(points) > 1}
        return draw_boxes(image, boxes, labels, found.class_names, scores, tracks, trails)
