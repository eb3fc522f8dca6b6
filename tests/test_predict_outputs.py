"""What ``predict`` writes: records, label files, COCO results, crops and annotated videos."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import detkit
from detkit.inference.frames import Frame
from detkit.inference.sources import list_source, open_source
from detkit.tasks import load_config, predict
from detkit.tasks.predictions.names import OutputNames, class_folders
from detkit.tasks.predictions.records import RecordFile
from tests.conftest import run_command

COUNT = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory, shapes_root) -> Path:
    """A video of a validation image that moves to the right."""
    image = cv2.imread(str(sorted((shapes_root / "images" / "val").iterdir())[0]))
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, image.shape[1::-1])
    for k in range(COUNT):
        writer.write(np.roll(image, 2 * k, axis=1))
    writer.release()
    return path


def predicted(run: Path, source: object, out: Path, *more: str) -> list[dict]:
    """The records of ``detkit predict`` with the checkpoint of a run, or a checkpoint."""
    listed = f"[{','.join(map(str, source))}]" if isinstance(source, list) else source
    overrides = [
        f"ckpt={run / 'best.safetensors' if run.is_dir() else run}",
        f"source={listed}",
        f"run_dir={out}",
        "device=cpu",
    ]
    assert predict.run(load_config("predict", [*overrides, "score=0.001", "max_det=3", *more])) == out
    return json.loads((out / "predictions.json").read_text())


def test_a_video_is_annotated_with_as_many_frames(finished_run, clip, tmp_path):
    records = predicted(finished_run, clip, tmp_path / "out", "amp=off")
    assert [(r["file"], r["frame"]) for r in records] == [(str(clip), k) for k in range(COUNT)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"clip.mp4", "predictions.json", "predictions.csv"}
    frames, originals = list(open_source(tmp_path / "out" / "clip.mp4")), list(open_source(clip))
    assert [frame.error for frame in frames] == [None] * COUNT
    assert {frame.fps for frame in frames} == {10.0}
    assert frames[0].image.shape == originals[0].image.shape
    assert all(
        (np.abs(a.image.astype(int) - b.image).max(-1) > 60).any() for a, b in zip(frames, originals, strict=True)
    )
    detector = detkit.load(finished_run / "best.safetensors")
    stream = list(detector.stream(clip, score=0.001, max_det=3, amp="off"))
    assert [found.frame for found in stream] == list(range(COUNT))
    for found, record in zip(stream, records, strict=True):
        np.testing.assert_allclose(found.boxes, [d["box"] for d in record["detections"]], atol=0.05)


def test_txt_coco_csv_and_crops_hold_the_same(finished_run, clip, shapes_root, tmp_path):
    images, out = sorted((shapes_root / "images" / "val").iterdir())[:2], tmp_path / "out"
    records = predicted(finished_run, [*images, clip], out, "save=[txt,coco,crops]")
    assert not list(out.glob("*.jpg")) and not list(out.glob("*.mp4"))
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    flat = [(record, detection) for record in records for detection in record["detections"]]
    assert len(flat) == len(rows) > 0
    for row, (record, detection) in zip(rows, flat, strict=True):
        assert row["file"] == record["file"] and row["name"] == detection["name"]
        assert row["frame"] == str(record.get("frame", "")) and row["track"] == ""
        assert [float(row[key]) for key in ("x1", "y1", "x2", "y2")] == detection["box"]
    coco, listed = (
        json.loads((out / "coco_results.json").read_text()),
        json.loads((out / "coco_images.json").read_text()),
    )
    assert [image["id"] for image in listed["images"]] == list(range(1, len(records) + 1))
    file_of = {image["id"]: image["file_name"].partition("#")[0] for image in listed["images"]}
    name_of = {category["id"]: category["name"] for category in listed["categories"]}
    for result, (record, detection) in zip(coco, flat, strict=True):
        x, y, w, h = result["bbox"]
        np.testing.assert_allclose((x, y, x + w, y + h), detection["box"], atol=1e-3)
        assert (file_of[result["image_id"]], name_of[result["category_id"]]) == (record["file"], detection["name"])
    stems = [image.stem for image in images] + [f"clip_{k:06}" for k in range(COUNT)]
    for stem, record in zip(stems, records, strict=True):
        lines = np.loadtxt(out / "labels" / f"{stem}.txt", ndmin=2).reshape(-1, 6)
        assert lines[:, 0].tolist() == [d["label"] for d in record["detections"]]
        centre, side = (
            lines[:, 1:3] * (record["width"], record["height"]),
            lines[:, 3:5] * (record["width"], record["height"]),
        )
        boxes = np.array([d["box"] for d in record["detections"]]).reshape(-1, 4)
        np.testing.assert_allclose(np.hstack((centre - side / 2, centre + side / 2)), boxes, atol=1e-3)
        for k, detection in enumerate(record["detections"]):
            crop = Image.open(out / "crops" / detection["name"] / f"{stem}_{k}.jpg")
            assert abs(crop.width - (detection["box"][2] - detection["box"][0])) <= 2


def test_nothing_is_drawn_on_request(finished_run, shapes_root, tmp_path):
    records = predicted(finished_run, shapes_root / "images" / "val", tmp_path / "out", "save=none", "workers=0")
    assert len(records) == 10
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"predictions.json", "predictions.csv"}


def test_options_of_the_command(checkpoint, shapes_root, tmp_path):
    def found(name: str, *options: str) -> list[dict]:
        source, common = shapes_root / "images" / "val", ("save=none", "amp=off", "max_det=300")
        return [d for r in predicted(checkpoint, source, tmp_path / name, *common, *options) for d in r["detections"]]

    everything = found("a")
    names = [name for name, _ in Counter(d["name"] for d in everything).most_common(2)]
    assert len(names) == 2
    strict = found("b", f"score={{{names[0]}: 0.6, default: 0.001}}")
    kept = [d for d in everything if d["name"] != names[0] or d["score"] > 0.6]
    assert 0 < len(strict) == len(kept) < len(everything)
    only = found("c", f"classes=[{names[1]}]", "batch_size=3")
    assert 0 < len(only) == sum(d["name"] == names[1] for d in everything)
    assert {d["name"] for d in only} == {names[1]}
    assert found("d", "rect=true", "tiles=128", "tta=true", "merge=wbf") not in ([], everything)


def test_a_broken_video_loses_no_other(finished_run, clip, shapes_root, tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    shutil.copy(clip, source / "b.mp4")
    (source / "a.mp4").write_bytes(b"broken")
    shutil.copy(sorted((shapes_root / "images" / "val").iterdir())[0], source / "c.jpg")
    arguments = [f"ckpt={finished_run / 'best.safetensors'}", f"source={source}", f"run_dir={out}", "device=cpu"]
    status, output, error = run_command(monkeypatch, capsys, "predict", *arguments)
    assert status == 2
    assert "a.mp4" in output and "a.mp4" in error
    assert len(json.loads((out / "predictions.json").read_text())) == COUNT + 1
    assert {"b.mp4", "c.jpg"} <= {p.name for p in out.iterdir()}


def test_records_are_complete_after_each_one(tmp_path):
    file = RecordFile(tmp_path / "a.json", "[\n", "\n]\n", ",\n")
    assert json.loads(file.temporary.read_text()) == []
    for k in range(3):
        file.append(json.dumps({"k": k}))
        assert json.loads(file.temporary.read_text()) == [{"k": j} for j in range(k + 1)]
    assert not file.path.exists()
    file.close()
    assert [record["k"] for record in json.loads(file.path.read_text())] == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_names_are_unique_and_keep_folders(tmp_path):
    files = ["a.jpg", "a.png", "b.mp4", "sub/a.jpg", "sub/b.jpg"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = list_source(tmp_path, recursive=True)
    names = OutputNames(items)
    assert [names.names[str(item)] for item in items] == ["a.jpg", "a.png", "b.mp4", "sub/a.jpg", "b.jpg"]
    names = OutputNames(
        [0, "rtsp://me:secret@host/x", *(tmp_path / name for name in ("rtsp-host-x.mp4", "A.jpg", "a.JPG"))]
    )
    assert names.source(Frame(None, name="camera 0")) == "camera-0"
    assert names.source(Frame(None, name="rtsp://host/x")) == "rtsp-host-x"
    assert names.source(Frame(None, name=str(tmp_path / "rtsp-host-x.mp4"))) == "rtsp-host-x-2"
    assert names.source(Frame(None, name=str(tmp_path / "a.JPG"))) == "a-2"
    assert class_folders(["../x", "a/b", "a b", "", "RBC", "rbc"]) == [
        "x",
        "a-b_1",
        "a-b_2",
        "unnamed",
        "RBC_4",
        "rbc_5",
    ]


@pytest.mark.parametrize("track", ["bytetrack", "sort", "ocsort"])
def test_an_object_keeps_its_track(track, tmp_path):
    pytest.importorskip("trackers")
    import torch

    from detkit.inference.tracking import Tracker
    from detkit.structures import Detections

    tracker = Tracker(track, 25.0)
    seen: dict[str, set[int]] = {"left": set(), "right": set()}
    for k in range(20):
        boxes = torch.tensor([[10.0 + 4 * k, 10, 50 + 4 * k, 60], [300.0 - 4 * k, 100, 360 - 4 * k, 160]])
        order = [0, 1] if k % 2 else [1, 0]
        found = Detections(boxes[order], torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), ("ball",), (200, 400), frame=k)
        found = tracker.update(found)
        assert len(found) == 2
        for position, side in zip(order, found.tracks.tolist(), strict=True):
            if side >= 0:
                seen["left" if position == 0 else "right"].add(side)
    assert [len(ids) for ids in seen.values()] == [1, 1]
    assert seen["left"] != seen["right"]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), ("ball",), (200, 400), frame=20)
    assert tracker.update(nothing).tracks.tolist() == []


def test_tracks_are_in_the_records_and_the_video(finished_run, clip, tmp_path):
    pytest.importorskip("trackers")
    records = predicted(finished_run, clip, tmp_path / "out", "track=sort")
    assert all("track" in d for r in records for d in r["detections"])
    assert len(list(open_source(tmp_path / "out" / "clip.mp4"))) == COUNT
