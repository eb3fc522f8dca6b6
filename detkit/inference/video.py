"""Frames of video files, network streams and cameras, decoded by OpenCV.

A frame is decoded when it is asked for, so memory does not grow with the length of a video.
"""

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np

from detkit.errors import DetkitError, UnreadableImage, shorten
from detkit.inference.frames import Frame
from detkit.ops.files import open_regular
from detkit.ops.image import is_image, max_pixels

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".mjpeg", ".mjpg"),
}
STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
TIMEOUT = 10.0  # seconds to wait for a stream to open, and for its next frame
MISSING = 0.05  # share of a video's frames that may be missing: containers often state their number only roughly

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's own messages about damaged videos


def is_video(name: str) -> bool:
    """Return whether a file name has the suffix of a video and is not hidden."""
    path = Path(name)
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def is_url(text: str) -> bool:
    """Return whether a text is a URL rather than a path."""
    return "://" in text


def check_url(url: str) -> str:
    """Return a URL if it can be a stream.

    Raises:
        DetkitError: its scheme is unknown, or it names an image, which is not downloaded.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DetkitError(f"source {shorten(url)} is not a valid URL: {error}") from None
    if parts.scheme.lower() not in STREAM_SCHEMES:
        raise DetkitError(f"source {stream_name(url)}: a stream begins with one of {', '.join(STREAM_SCHEMES)}")
    if is_image(parts.path):
        raise DetkitError(f"source {stream_name(url)}: images are not downloaded, save it to a file first")
    return url


def stream_name(source: str | int) -> str:
    """Return what messages and records call a stream: its URL without user and password, or ``camera 0``."""
    if isinstance(source, int):
        return f"camera {source}"
    return shorten(urlsplit(source)._replace(netloc=urlsplit(source).netloc.rpartition("@")[2]).geturl())


def read_video(path: Path) -> Iterator[Frame]:
    """Yield every frame of a video file; if it is damaged or ends early, finally one with an ``error``."""
    try:
        capture = _open_file(path)
    except UnreadableImage as error:
        yield Frame(path, name=str(path), error=error)
        return
    yield from _read_all(capture, path, str(path))


def read_stream(source: str | int) -> Iterator[Frame]:
    """Yield the newest frame of a camera or live stream whenever one is asked for, or every frame of a remote video.

    A stream whose number of frames is known is a video, of which no frame is dropped. ``Frame.index`` counts the
    frames that were received, dropped ones included. No frame within TIMEOUT ends the stream with an ``error``.
    """
    name = stream_name(source)
    capture = _open(source)
    if capture is None:
        yield _failed(None, name, f"cannot open {name}: there is no such stream or camera, or it does not answer")
    elif capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
        yield from _read_all(capture, None, name)
    else:
        yield from _read_newest(capture, name)


def count_frames(path: Path) -> int:
    """Return the number of frames that a video file states, 0 if it cannot be read; the number may be an estimate."""
    try:
        capture = _open_file(path)
    except UnreadableImage:
        return 0
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return max(count, 0)


def _open_file(path: Path) -> cv2.VideoCapture:
    """Open a video file.

    Raises:
        UnreadableImage: it is missing, not a regular file, or cannot be decoded.
    """
    try:
        open_regular(path).close()  # OpenCV would wait for a pipe
        os.fsencode(path).decode("utf-8")  # OpenCV crashes at other names
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "its name is not UTF-8, rename it"
    else:
        capture = _open(str(path.absolute()))  # a name such as concat:a would be a protocol
        if capture is not None:
            return capture
        reason = "it is truncated, damaged or of an unknown codec"
    raise UnreadableImage(f"cannot read video {shorten(str(path))}: {reason}")


def _open(source: str | int) -> cv2.VideoCapture | None:
    """Open a file, stream or camera with timeouts; return None if that fails."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a failure is reported here
    try:
        if isinstance(source, int):
            capture = cv2.VideoCapture(source)
        else:
            limit = int(TIMEOUT * 1000)
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
            capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)
    except cv2.error:
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)
    return capture if capture.isOpened() else None


def _read_all(capture: cv2.VideoCapture, path: Path | None, name: str) -> Iterator[Frame]:
    """Yield every frame; finally one with an ``error`` if many are missing."""
    fps = _fps(capture)
    index = 0
    try:
        size = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if size[0] * size[1] > max_pixels():
            yield _failed(
                path, name, f"{shorten(name)} has more pixels a frame than the limit max_pixels={max_pixels()}"
            )
            return
        while (image := _next(capture)) is not None:
            yield Frame(path, image, index, fps, name)
            index += 1
        stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if index == 0 or index < stated * (1 - MISSING):
            yield _failed(path, name, f"video {shorten(name)} is damaged: {index} of {stated} frames could be decoded")
    finally:
        capture.release()


def _read_newest(capture: cv2.VideoCapture, name: str) -> Iterator[Frame]:
    """Yield the newest frame at the time it is asked for; older ones are dropped."""
    fps = _fps(capture)
    newest: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(1)  # None: the end
    stopped = threading.Event()

    def receive() -> None:
        index = 0
        while not stopped.is_set() and (image := _next(capture)) is not None:
            with suppress(queue.Empty):
                newest.get_nowait()
            newest.put((index, image))  # does not wait, as nobody else puts
            index += 1
        while not stopped.is_set():
            with suppress(queue.Full):
                return newest.put(None, timeout=0.2)

    thread = threading.Thread(target=receive, name="detkit-stream", daemon=True)  # a camera may block
    thread.start()
    try:
        while (entry := newest.get(timeout=2 * TIMEOUT)) is not None:
            yield Frame(None, entry[1], entry[0], fps, name)
    except queue.Empty:
        yield _failed(None, name, f"{name} sent no frame for {2 * TIMEOUT:g} seconds")
    finally:
        stopped.set()
        thread.join(2 * TIMEOUT)
        if not thread.is_alive():
            capture.release()


def _next(capture: cv2.VideoCapture) -> np.ndarray | None:
    """Return the next frame, (H, W, 3) uint8 RGB; None at the end."""
    try:
        received, image = capture.read()
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if received else None
    except cv2.error:
        return None


def _fps(capture: cv2.VideoCapture) -> float | None:
    fps = capture.get(cv2.CAP_PROP_FPS)
    return float(fps) if 0 < fps <= 1000 else None


def _failed(path: Path | None, name: str, message: str) -> Frame:
    return Frame(path, name=name, error=UnreadableImage(message))
