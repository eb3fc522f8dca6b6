"""Any transform of albumentations by its name: boxes follow, sizes stay, mistakes are one message."""

from pathlib import Path

import numpy as np
import pytest

from detkit.data.augment.transforms import build_transform
from detkit.errors import DetkitError
from detkit.structures import ImageMeta, Sample

SIZE = 160


def sample_with(boxes: list[tuple[float, ...]]) -> Sample:
    """Black, with every box filled white."""
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    for x1, y1, x2, y2 in np.array(boxes).round().astype(int).clip(0).tolist():
        image[y1:y2, x1:x2] = 255
    table = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(image, table, np.arange(len(boxes)), ImageMeta(0, Path(), (SIZE, SIZE)))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("VerticalFlip", {}),
        ("RandomRotate90", {}),
        ("Affine", {"scale": 0.8, "translate_px": 10}),
        ("RandomCrop", {"height": 120, "width": 120}),
        ("CenterCrop", {"height": 140, "width": 120}),
        ("RandomResizedCrop", {"size": [100, 100], "scale": [0.6, 1.0]}),
        ("BBoxSafeRandomCrop", {}),
        ("RandomSizedBBoxSafeCrop", {"height": 100, "width": 100}),
        ("LongestMaxSize", {"max_size": 90}),
        ("PadIfNeeded", {"min_height": 200, "min_width": 300}),
    ],
)
def test_boxes_follow_and_the_size_stays(name, arguments):
    transform = build_transform(name, {"p": 1.0, **arguments}, SIZE)
    for seed in range(5):
        result = transform(sample_with([(70, 50, 100, 90)]), np.random.default_rng(seed))
        assert (result.image.shape, result.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (result.boxes.dtype, result.labels.dtype) == (np.float32, np.int64)
        ys, xs = np.nonzero(result.image.min(2) > 150)
        found = np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        np.testing.assert_allclose(result.boxes, found[None], atol=1.5)


@pytest.mark.parametrize("name", ["Rotate", "Affine", "Perspective", "BBoxSafeRandomCrop", "CoarseDropout"])
def test_boxes_outside_or_without_area_are_no_error(name):
    boxes = [(-0.01, 5, 30, 160.02), (50, 50, 50, 60), (-30, -30, -5, -5)]
    transform = build_transform(name, {"p": 1.0}, SIZE)
    for seed in range(5):
        result = transform(sample_with(boxes), np.random.default_rng(seed))
        assert result.boxes.shape == (len(result.labels), 4)
        assert set(result.labels) <= {0}
        empty = transform(sample_with([]), np.random.default_rng(seed))
        assert (empty.boxes.shape, empty.labels.shape) == ((0, 4), (0,))


def test_what_a_transform_leaves_too_little_of_is_dropped():
    """As ``clip_boxes`` does: boxes cut to a pixel, to a fourteenth, to a pixel and a half."""
    crop = build_transform("Crop", {"p": 1.0, "x_min": 40, "y_min": 0, "x_max": 120, "y_max": 80}, SIZE)
    sample = sample_with([(20, 20, 41, 30), (0, 0, 43, 20), (118.5, 10, 126, 20), (30, 10, 60, 40)])
    result = crop(sample, np.random.default_rng(0))
    assert result.labels.tolist() == [3]
    np.testing.assert_allclose(result.boxes, [[0, 20, 40, 80]], atol=1e-3)  # 80 pixels became 160


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("MaskDropout", {}, "MaskDropout needs mask for every image"),
        ("FDA", {}, "FDA needs fda_metadata for every image"),
        ("Normalize", {}, "Normalize does not return a uint8 RGB image"),
        ("ToTensorV2", {}, "ToTensorV2 does not return a uint8 RGB image"),
        ("RandomCrop", {"height": 300, "width": 300}, "RandomCrop fails on an image of 160x160 pixels: "),
        ("RandomCrop", {"height": -1, "width": 300}, "RandomCrop rejects its arguments"),
        ("RandomCrop", {}, "RandomCrop rejects its arguments"),
        ("Blur", 0.5, "augment.transforms.Blur=0.5 must be a mapping"),
        ("Blur", {"p": 1.5}, "augment.transforms.Blur.p=1.5 must be a number from 0 to 1"),
        ("flip", {"p": "often"}, "augment.transforms.flip.p=often must be a number from 0 to 1"),
    ],
)
def test_mistakes_are_named_before_the_training_starts(name, arguments, message):
    with pytest.raises(DetkitError, match=message) as error:
        build_transform(name, arguments, SIZE)
    assert "\n" not in str(error.value)
