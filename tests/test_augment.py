import colorsys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from detkit.config import compose_config, group_options, resolve
from detkit.data import cache, dataset
from detkit.data.augment import pipeline
from detkit.data.augment.mosaic import Affine, clip_boxes, mosaic_affine
from detkit.data.augment.pipeline import AugmentedDataset, mosaic_window
from detkit.data.augment.transforms import build_transform
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader, EpochSampler
from detkit.errors import DetkitError
from detkit.ops.image import decode_resized
from detkit.structures import ImageMeta, Sample

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]


def rectangle(rng: np.random.Generator, colour: tuple[int, int, int], label: int) -> Sample:
    """A black image of any size with one filled rectangle, and its box."""
    height, width = rng.integers(40, 200, 2)
    w, h = (int(rng.uniform(0.3, 0.6) * n) for n in (width, height))
    x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    image = np.zeros((height, width, 3), np.uint8)
    image[y : y + h, x : x + w] = colour
    box = np.array([[x, y, x + w, y + h]], np.float32)
    return Sample(image, box, np.array([label]), ImageMeta(0, Path("drawn"), (height, width)))


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("seed", range(40))
def test_boxes_are_where_their_pixels_are(tiles, seed):
    """The drawn rectangles, found again in the output, have the boxes that came out."""
    rng = np.random.default_rng(seed)
    samples = [rectangle(rng, COLOURS[k], k) for k in range(tiles)]
    result = mosaic_affine(samples, 160, rng, Affine((0.5, 1.5), 0.1))
    assert result.image.shape == (160, 160, 3)
    assert result.boxes.dtype == np.float32
    for box, label in zip(result.boxes, result.labels, strict=True):
        near = np.abs(result.image.astype(int) - COLOURS[label]).max(-1) < 128
        ys, xs = np.nonzero(near)
        found = np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        assert np.abs(found - box).max() <= 1.0, (found, box)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("seed", range(30))
def test_turned_boxes_are_around_their_pixels(tiles, seed):
    """Of a rectangle that is wholly in the image, the box is that of its pixels; of a cut one, it holds them."""
    rng = np.random.default_rng(seed)
    samples = [rectangle(rng, COLOURS[k], k) for k in range(tiles)]
    result = mosaic_affine(samples, 160, rng, Affine((0.5, 1.5), 0.1, degrees=180.0, shear=15.0))
    assert result.image.shape == (160, 160, 3)
    for box, label in zip(result.boxes, result.labels, strict=True):
        near = np.abs(result.image.astype(int) - COLOURS[label]).max(-1) < 128
        ys, xs = np.nonzero(near)
        found = np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        outside = np.maximum(box[:2] - found[:2], found[2:] - box[2:]).max()
        assert outside <= 1.0, (found, box)
        if tiles == 1 and box.min() > 0 and box.max() < 160:
            assert np.abs(found - box).max() <= 2.0, (found, box)  # a sharp corner fills less than half of its pixel


def test_a_quarter_turn_moves_pixels_as_it_moves_edges(monkeypatch):
    """A checkerboard turned by 90 degrees is the turned checkerboard: nothing is half a pixel off."""
    board = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    sample = Sample(board, np.array([[0, 0, 16, 8]], np.float32), np.array([0]), ImageMeta(0, Path("drawn"), (64, 64)))
    turn = np.array(((0.0, 1.0), (-1.0, 0.0)))
    monkeypatch.setattr(Affine, "draw", lambda *_: (turn, np.array((0.0, 64.0))))
    result = mosaic_affine([sample], 64, np.random.default_rng(0), Affine())
    assert np.array_equal(result.image, np.rot90(board))
    assert result.boxes.tolist() == [[0, 48, 8, 64]]


@pytest.mark.parametrize("seed", range(20))
def test_an_enlarged_tile_is_where_it_was_asked_to_be(seed, monkeypatch):
    """An image of a few pixels, much enlarged: its place is right to a pixel of the output, not of the image."""
    rng = np.random.default_rng(seed)
    image = np.zeros((12, 16, 3), np.uint8)
    box = np.array([[4, 3, 12, 9]], np.float32)
    sample = Sample(image, box, np.array([0]), ImageMeta(0, Path("drawn"), (12, 16)))
    factor, shift = rng.uniform(1, 2), rng.uniform(-60, 0, 2)
    monkeypatch.setattr(Affine, "draw", lambda *_: (factor * np.eye(2), shift))
    result = mosaic_affine([sample], 160, rng, Affine())
    scale = 10 * factor
    asked = box * scale + np.tile(np.array((0, 20)) * factor + shift, 2)
    np.testing.assert_allclose(result.boxes, asked.clip(0, 160), atol=1)


def test_no_augmentation_is_a_letterbox():
    sample = rectangle(np.random.default_rng(0), COLOURS[0], 0)
    result = mosaic_affine([sample], 128, np.random.default_rng(0), Affine())
    height, width = sample.image.shape[:2]
    ratio = 128 / max(height, width)
    offset = (128 - np.array((width, height)) * ratio) / 2
    np.testing.assert_allclose(result.boxes, sample.boxes * ratio + np.tile(offset, 2), atol=1)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ((10, 10, 30, 30), True),
        ((-18, 10, 2, 30), False),  # two pixels are left
        ((-95, 10, 5, 30), False),  # a twentieth is left
        ((-50, 10, 50, 30), True),
        ((0, 10, 90, 12.5), True),
        ((10, 10, 10, 30), False),
        ((110, 10, 130, 30), False),
    ],
)
def test_what_is_too_little_is_dropped(box, kept):
    boxes, keep = clip_boxes(np.array([box], np.float64), np.array((0, 0, 100, 100)))
    assert keep.tolist() == [kept]
    assert boxes.min(initial=0) >= 0


def test_flip_mirrors_the_box_with_the_image():
    sample = rectangle(np.random.default_rng(1), COLOURS[0], 0)
    result = build_transform("flip", {"p": 1.0})(sample, np.random.default_rng(0))
    ys, xs = np.nonzero(result.image[..., 0])
    assert result.boxes[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gains", [(0, 0, 0), (0, 0.7, 0), (0, 0, 0.4), (0, 0.7, 0.4), (0.015, 0, 0)])
def test_hsv_is_that_of_the_cone_where_nothing_is_clipped(gains, seed):
    """Against colorsys, pixel by pixel in float64."""
    image = np.random.default_rng(seed).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    image = (image // 3 + 90).astype(np.uint8)  # of moderate saturation: the hue turns about evenly there
    sample = Sample(image.copy(), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ImageMeta(0, Path(), (20, 10)))
    hsv = build_transform("hsv", dict(zip(("hue", "saturation", "value"), gains, strict=True)), 64)
    result = hsv(sample, np.random.default_rng(seed)).image.reshape(-1, 3)
    turn, s, v = np.random.default_rng(seed).uniform(-1, 1, 3) * gains
    for before, after in zip(image.reshape(-1, 3) / 255, result, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        wanted = (hue + turn) % 1, saturation * (1 + s), value * (1 + v)
        if wanted[1] <= 1 and wanted[2] <= 1:
            assert np.abs(255 * np.array(colorsys.hsv_to_rgb(*wanted)) - after).max() <= (4 if turn else 2)


def test_albumentations_carry_boxes_and_draw_from_our_generator():
    flip = build_transform("HorizontalFlip", {"p": 1.0})
    sample = rectangle(np.random.default_rng(1), COLOURS[0], 3)
    result = flip(sample, np.random.default_rng(0))
    _, xs = np.nonzero(result.image[..., 0])
    np.testing.assert_allclose(result.boxes[0][[0, 2]], (xs.min(), xs.max() + 1), atol=1e-3)
    assert result.labels.tolist() == [3]
    noise = build_transform("GaussNoise", {"p": 1.0})
    seen = [
        noise(rectangle(np.random.default_rng(1), COLOURS[0], 0), np.random.default_rng(s)).image for s in (0, 0, 1)
    ]
    assert np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Blurr", {}, "did you mean 'Blur'"),
        ("flip", {"q": 1}, "takes no argument 'q'"),
        ("hsw", {}, "did you mean 'hsv'"),
    ],
)
def test_mistakes_in_a_transform_are_named(name, arguments, message):
    with pytest.raises(DetkitError, match=message):
        build_transform(name, arguments)


@pytest.fixture(scope="module")
def augmented(shapes_root) -> AugmentedDataset:
    chosen = [
        "augment.transforms.CLAHE.p=0.5",
        "augment.mosaic.close_epochs=1",
        "~data.preset",
    ]  # not the embedded set's
    augment = resolve(compose_config("train", chosen))["augment"]
    return AugmentedDataset(DetectionDataset(read_shapes("train", root=str(shapes_root))), 64, augment, 0, 3)


@pytest.mark.parametrize("window", [0, 16])
def test_a_sample_depends_on_its_key_alone(augmented, window):
    """On seed, epoch, index and window; not on who makes it, nor on what that process made before."""
    batches = {}
    for workers in (0, 2):
        loader = BatchLoader(augmented, 8, workers=workers, seed=0, shuffle=True, window=window)
        batches[workers] = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    assert len(batches[0]) == len(batches[2]) == 6
    for one, other in zip(batches[0], batches[2], strict=True):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.boxes_bm4, other.boxes_bm4)
    first, second = ([o.index for b in batches[0][k : k + 3] for o in b.metas] for k in (0, 3))
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second


@pytest.mark.parametrize(("length", "window"), [(24, 16), (40, 16), (10, 16), (32, 8)])
def test_windows_are_stretches_of_the_order(length, window):
    sampler = EpochSampler(length, seed=3, window=window)
    keys = list(sampler)
    order = [key.index for key in keys]
    assert sorted(order) == list(range(length))
    for position, (_, index, _, pool) in enumerate(keys):
        assert index in pool
        assert len(pool) == min(window, length)
        last = min((position // window + 1) * window, length)
        assert pool == order[max(last - window, 0) : last]


def test_an_image_of_a_window_is_decoded_once(shapes_root, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        dataset, "decode_resized", lambda data, path, *rest: decoded.append(path) or decode_resized(data, path, *rest)
    )
    monkeypatch.setattr(cache, "LOCAL_CACHE_BYTES", 0)
    images = DetectionDataset(read_shapes("train", root=str(shapes_root)), 64)
    window = mosaic_window("auto", images, 4)
    assert [mosaic_window("window", images, n) for n in (4, 6, 10, 24, 61, 64, 100)] == [16, 18, 20, 24, 16, 16, 20]
    assert window == 16
    assert mosaic_window("set", images, 4) == 0
    augment = {"mosaic": {"p": 1.0, "close_epochs": 0}, "affine": {}, "transforms": {}}
    sampler = EpochSampler(16, window=window)
    view = AugmentedDataset(images, 64, augment, 0, 3)
    for key in sampler:
        view[key]
    assert len(decoded) == len(set(decoded)) == 16


def test_mosaic_is_off_in_the_last_epochs(augmented, monkeypatch):
    tiles = []
    monkeypatch.setattr(
        pipeline, "mosaic_affine", lambda samples, *rest: tiles.append(len(samples)) or mosaic_affine(samples, *rest)
    )
    for epoch in range(3):
        augmented[epoch, 0]
    assert tiles == [4, 4, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_becomes_unreadable_is_skipped_and_named(shapes_root, tmp_path, workers):
    annotations = read_shapes("train", root=str(shapes_root))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    annotations.paths = [broken if k == 4 else path for k, path in enumerate(annotations.paths)]
    augment = resolve(compose_config("train", ["~data.preset"]))["augment"]  # with mosaics: it may be a partner, too
    dataset = AugmentedDataset(DetectionDataset(annotations, 64), 64, augment, 0, 20)
    batches = list(BatchLoader(dataset, 4, workers=workers).epoch(0))
    assert [len(batch.images) for batch in batches] == [4, 3, 4, 4, 4, 4]
    assert sorted({*range(24)} - {o.index for batch in batches for o in batch.metas}) == [4]
    (issue,) = (message for batch in batches for message in batch.issues)
    assert issue.startswith(f"cannot read image {broken}: ")
    annotations.paths = [broken] * 24
    dataset = AugmentedDataset(DetectionDataset(annotations, 64), 64, augment, 0, 20)
    with pytest.raises(DetkitError, match=r"no image of this epoch can be read; .*: cannot read image"):
        list(BatchLoader(dataset, 4, workers=workers).epoch(0))


class Failing(Dataset):
    """Its third sample cannot be made, for a reason that no other image would cure."""

    def __len__(self):
        return 6

    def __getitem__(self, key):
        if key[1] == 2:
            raise DetkitError("augment.transforms: Blur fails")
        return rectangle(np.random.default_rng(0), COLOURS[0], 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_arrives_as_its_message(workers):
    with pytest.raises(DetkitError, match=r"^augment\.transforms: Blur fails$"):
        list(BatchLoader(Failing(), 2, workers=workers).epoch(0))


@pytest.mark.parametrize("name", group_options("augment"))
def test_every_augmentation_preset_makes_samples(name, shapes_root):
    cfg = resolve(compose_config("train", [f"augment={name}", "~data.preset"]))
    dataset = AugmentedDataset(DetectionDataset(read_shapes("train", root=str(shapes_root))), 64, cfg["augment"], 0, 30)
    for index in range(4):
        sample = dataset[0, index]
        assert sample.image.shape == (64, 64, 3)
        assert sample.image.dtype == np.uint8
        assert sample.boxes.min(initial=0) >= 0
        assert sample.boxes.max(initial=0) <= 64
