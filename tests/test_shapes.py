import multiprocessing

import numpy as np
import pytest

from detkit.data.formats import shapes
from detkit.data.formats.shapes import MIN_SHAPE, OUTLINES, SIZE, draw_image, read_shapes
from detkit.errors import DetkitError


def test_images_depend_on_their_seed_alone():
    (first, objects), (again, same), (other, _) = (draw_image(np.random.default_rng((0, k))) for k in (5, 5, 6))
    assert np.array_equal(first, again)
    assert objects == same
    assert not np.array_equal(first, other)


def test_the_set_has_what_it_promises():
    drawn = [draw_image(np.random.default_rng((0, k)))[1] for k in range(60, 120)]
    boxes = np.array([box for objects in drawn for _, box, _ in objects])
    assert {label for objects in drawn for label, _, _ in objects} == set(range(len(OUTLINES)))
    assert any(not objects for objects in drawn)
    assert boxes[:, 2:].max() > 120
    assert 0.5 * MIN_SHAPE < boxes[:, 2:].max(1).min() < 1.2 * MIN_SHAPE
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= SIZE).all()


def _read(root):
    shapes.SPLITS.update(train=6, val=2)
    return len(read_shapes("train", root=str(root)))


def test_two_processes_may_start_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_read, [tmp_path / "set"] * 2) == [6, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]  # no scratch folder stays behind


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DetkitError, match=r"cannot write the shapes to .*set data\.root to a folder you own"):
        read_shapes("train", root=str(tmp_path / "file" / "set"))
