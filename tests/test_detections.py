"""Detections: how they print, slice, filter and convert."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.errors import DetkitError
from detkit.structures import Detections

BOXES = [[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 9.0, 8.0], [1.0, 2.0, 3.0, 4.0]]


@pytest.fixture
def found() -> Detections:
    labels = torch.tensor([1, 0, 1])
    scores = torch.tensor([0.9, 0.5, 0.25])
    return Detections(torch.tensor(BOXES), scores, labels, ("WBC", "RBC"), (480, 640), Path("x/a.jpg"))


def empty() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ("WBC",), (4, 5))


def test_they_print_in_one_line(found):
    assert repr(found) == str(found) == "3 objects in a.jpg (480x640): 1 WBC, 2 RBC"
    assert str(found[:1]) == "1 object in a.jpg (480x640): 1 RBC"
    assert str(empty()) == "0 objects (4x5): nothing"


@pytest.mark.parametrize(
    ("index", "kept"),
    [
        (0, [0]),
        (-1, [2]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        ([2, 0], [2, 0]),
        ([], []),
        (np.array([True, False, True]), [0, 2]),
        (torch.tensor([False, True, False]), [1]),
        (torch.tensor([1, 1]), [1, 1]),
        (np.int64(1), [1]),
    ],
)
def test_they_are_sliced_as_an_array(found, index, kept):
    found.tracks = torch.tensor([7, -1, 8])
    part = found[index]
    assert part.boxes.tolist() == [BOXES[k] for k in kept]
    assert part.scores.tolist() == found.scores[kept].tolist()
    assert part.labels.tolist() == found.labels[kept].tolist()
    assert part.tracks.tolist() == found.tracks[kept].tolist()
    assert (part.size, part.path, part.class_names) == (found.size, found.path, found.class_names)


def test_they_are_iterated_by_object(found):
    assert [one.names for one in found] == [["RBC"], ["WBC"], ["RBC"]]
    with pytest.raises(IndexError):
        found[3]


def test_they_are_filtered(found):
    assert len(found.filter(score=0.5)) == 2
    assert found.filter(classes=["WBC"]).boxes.tolist() == [BOXES[1]]
    assert found.filter(0.5, [1]).boxes.tolist() == [BOXES[0]]
    assert len(found.filter(classes=[])) == 0
    with pytest.raises(DetkitError, match="Platelets"):
        found.filter(classes=["Platelets"])


def test_a_record_is_plain_data(found):
    record = found.to_dict()
    assert (record["file"], record["height"], record["width"]) == ("x/a.jpg", 480, 640)
    assert record["detections"][1] == {"box": BOXES[1], "score": 0.5, "label": 0, "name": "WBC"}
    assert "frame" not in record
    found.frame, found.tracks = 3, torch.tensor([7, -1, 8])
    record = found.to_dict()
    assert record["frame"] == 3
    assert [d["track"] for d in record["detections"]] == [7, None, 8]


def test_coco_results(found):
    assert found.to_coco(5)[0] == {
        "image_id": 5,
        "category_id": 2,
        "bbox": [0.0, 0.0, 10.0, 20.0],
        "score": pytest.approx(0.9),
    }
    assert [r["category_id"] for r in found.to_coco(5, category_ids=[10, 30])] == [30, 10, 30]
    assert empty().to_coco(1) == []


def test_pandas(found):
    pytest.importorskip("pandas")
    table = found.to_pandas()
    assert table[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == BOXES
    assert list(table["name"]) == ["RBC", "WBC", "RBC"]
    assert len(empty().to_pandas()) == 0


def test_supervision(found):
    supervision = pytest.importorskip("supervision")
    for one in (found, empty(), found[:0]):
        converted = one.to_supervision()
        assert isinstance(converted, supervision.Detections)
        assert converted.xyxy.tolist() == one.boxes.tolist()
        assert converted.class_id.tolist() == one.labels.tolist()
        assert converted.data["class_name"].tolist() == one.names


def test_a_missing_package_is_a_sentence(found, monkeypatch):
    for name in ("pandas", "supervision"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(DetkitError, match=f"pip install {name}"):
            getattr(found, f"to_{name}")()
