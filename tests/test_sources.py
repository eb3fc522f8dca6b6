"""Sources of frames: files, folders, patterns, lists, texts, videos, streams, and images in memory."""

import http.server
import io
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detkit.errors import DetkitError, UnreadableImage
from detkit.inference import video
from detkit.inference.sources import count_items, list_source, open_source

GRAYS = [5 * k + 20 for k in range(40)]


def write_video(path: Path, grays: list[int] = GRAYS, fps: float = 12.5, codec: str = "mp4v") -> Path:
    """Write frames of one gray level each, which survive compression."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (96, 64))
    for gray in grays:
        writer.write(np.full((64, 96, 3), gray, np.uint8))
    writer.release()
    return path


def levels(frames) -> list[float]:
    return [float(frame.image.mean()) for frame in frames]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b.jpg", "a.png", "sub/c.jpg", "sub/.hidden/d.jpg", ".e.jpg", "note.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name, "png")
    return tmp_path


def names(source, **options) -> list[str]:
    return [Path(frame.name).name for frame in open_source(source, **options)]


def test_folders_patterns_and_lists(folder):
    assert names(folder) == names(str(folder)) == ["a.png", "b.jpg"]
    assert names(folder, recursive=True) == ["a.png", "b.jpg", "c.jpg"]
    assert names(f"{folder}/*.jpg") == ["b.jpg"]
    assert names(f"{folder}/**/*.jpg") == ["b.jpg", "c.jpg"]
    assert names([folder / "sub", f"{folder}/a.*", [str(folder / "b.jpg")]]) == ["c.jpg", "a.png", "b.jpg"]
    (folder / "x[1].jpg").write_bytes((folder / "b.jpg").read_bytes())
    assert names(f"{folder}/x[1].jpg") == ["x[1].jpg"]  # a file of this name, not a pattern


def test_a_text_names_paths_relative_to_its_folder(folder, monkeypatch):
    text = folder / "list.txt"
    text.write_text("# these\nb.jpg\n\n  sub/c.jpg  \nmissing.jpg\nrtsp://host/x\n")
    items = list_source(text)
    assert items == [folder / "b.jpg", folder / "sub/c.jpg", folder / "missing.jpg", "rtsp://host/x"]
    for content, message in (("# nothing\n", "no paths"), ("a\0b", "not a text of paths"), ("x" * 5000, "line 1")):
        text.write_text(content)
        with pytest.raises(DetkitError, match=message):
            list_source(str(text))
    text.write_text("list.txt\n")
    assert list_source(text) == [text]  # not followed for ever


def test_standard_input_names_paths(folder):
    code = "from detkit.inference.sources import list_source; import sys; print(*list_source('-'), sep='|')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=b"a.png\ncaf\xe9.jpg\n",
        capture_output=True,
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"},
    )
    assert result.stdout == b"a.png|caf\xe9.jpg\n", result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none/*.jpg", "matches no files"),
        ("none.mp4", "does not exist"),
        ([], "empty list"),
        (None, "NoneType"),
        (1.5, "float"),
        ("ftp://host/a.mp4", "begins with one of"),
        ("https://user:secret@host/a.jpg", "not downloaded"),
        (np.zeros((3, 4), np.uint8), "uint8 RGB"),
        (np.zeros((3, 4, 3), np.float32), "uint8 RGB"),
    ],
)
def test_a_source_that_cannot_be_is_named(source, message):
    with pytest.raises(DetkitError, match=message) as error:
        open_source(source)
    assert "secret" not in str(error.value)


def test_missing_entries_of_a_list_do_not_end_it(folder):
    assert names([folder / "none.jpg", folder / "b.jpg", folder / "none.mp4"]) == ["none.jpg", "b.jpg", "none.mp4"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "RGB"])
def test_pil_images_of_any_mode(mode):
    image = Image.new("RGB", (7, 5), (255, 255, 255)).convert(mode)
    (frame,) = open_source(image)
    assert frame.image.shape == (5, 7, 3)
    assert frame.image.dtype == np.uint8
    assert (frame.image == 255).all()


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mp4v"), ("a.avi", "MJPG")])
def test_a_video_gives_every_frame_in_order(name, codec, tmp_path):
    path = write_video(tmp_path / name, codec=codec)
    frames = list(open_source(path))
    np.testing.assert_allclose(levels(frames), GRAYS, atol=4)
    assert [frame.index for frame in frames] == list(range(len(GRAYS)))
    assert {frame.fps for frame in frames} == {12.5}
    assert count_items(list_source([path, path])) == 2 * len(GRAYS)


def test_a_video_is_rgb(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "red.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    writer.write(np.full((64, 96, 3), (0, 0, 255), np.uint8))  # blue, green, red
    writer.release()
    (frame,) = open_source(tmp_path / "red.mp4")
    assert frame.image[..., 0].mean() > 200 > 60 > frame.image[..., 2].mean()


def test_what_a_damaged_video_holds_is_kept_and_reported(tmp_path):
    content = write_video(tmp_path / "a.avi", codec="MJPG").read_bytes()
    (tmp_path / "short.avi").write_bytes(content[: len(content) // 2])
    *frames, last = open_source(tmp_path / "short.avi")
    assert 5 < len(frames) < len(GRAYS)
    np.testing.assert_allclose(levels(frames[:-1]), GRAYS[: len(frames) - 1], atol=4)  # the last one is cut
    assert isinstance(last.error, UnreadableImage)
    assert "short.avi" in str(last.error)
    content = write_video(tmp_path / "b.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])  # its index is at the end
    (tmp_path / "noise.mp4").write_bytes(b"noise")
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("cut.mp4", "noise.mp4", "empty.mp4", "pipe.mp4", os.fsdecode(b"caf\xe9.mp4")):
        (frame,) = open_source([tmp_path / name])
        assert frame.image is None
        assert isinstance(frame.error, UnreadableImage)


def test_memory_does_not_grow_with_a_video(tmp_path):
    frames = open_source(write_video(tmp_path / "a.mp4", GRAYS * 5))
    read = [next(frames).index for _ in range(3)]
    assert read == [0, 1, 2]
    frames.close()  # in the middle


class Camera(http.server.BaseHTTPRequestHandler):
    """A network camera: JPEG frames one after the other, faster than they are looked at."""

    frames, pause = 60, 0.02

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        try:
            for k in range(self.frames):
                data = io.BytesIO()
                Image.new("RGB", (96, 64), (4 * k,) * 3).save(data, "jpeg")
                self.wfile.write(
                    b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data.getvalue())
                )
                self.wfile.write(data.getvalue() + b"\r\n")
                time.sleep(self.pause)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def camera():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/stream.mjpg"
    server.shutdown()
    server.server_close()


def test_a_live_stream_gives_the_newest_frame(camera):
    indices, seen = [], []
    for frame in open_source(camera):
        assert frame.error is None
        indices.append(frame.index)
        seen.append(frame.image.mean())
        time.sleep(0.15)  # as a slow network
    assert len(indices) < Camera.frames / 2
    assert indices == sorted(set(indices))
    np.testing.assert_allclose(seen, [4 * k for k in indices], atol=4)
    assert indices[-1] > Camera.frames - 10


def test_a_live_stream_that_is_left_ends_its_thread(camera):
    before = threading.active_count()
    frames = open_source(camera)
    next(frames)
    frames.close()
    assert "detkit-stream" not in [thread.name for thread in threading.enumerate()]
    assert threading.active_count() <= before + 1  # the server's


def test_a_stream_that_does_not_answer_ends(monkeypatch):
    monkeypatch.setattr(video, "TIMEOUT", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for scheme in ("http", "rtsp"):
            (frame,) = open_source(f"{scheme}://me:secret@127.0.0.1:{silent.getsockname()[1]}/x")
            assert isinstance(frame.error, UnreadableImage)
            assert "secret" not in str(frame.error)


def test_a_camera_that_is_missing_is_named():
    for source in (97, "97"):
        (frame,) = open_source(source)
        assert "camera 97" in str(frame.error)
