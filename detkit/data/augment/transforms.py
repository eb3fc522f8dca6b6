"""Augmentations after the mosaic: each takes a Sample and a random generator and returns a Sample.

A transform may modify the sample in place and return it.

``build_transform`` accepts the lower-case names of detkit's transforms and the class names of albumentations'.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detkit.data.augment.mosaic import MAX_ASPECT, MIN_SIDE, MIN_VISIBLE
from detkit.errors import DetkitError, nearest
from detkit.ops.image import PAD_VALUE, Letterbox
from detkit.registry import Registry
from detkit.structures import ImageMeta, Sample

Transform = Callable[[Sample, np.random.Generator], Sample]
TRANSFORMS = Registry("transform")
STRIP = 128  # image rows processed at once


@TRANSFORMS.register("hsv")
class HSV:
    """Change hue, saturation and value by random amounts.

    The value is multiplied by 1 - gain .. 1 + gain. So is the saturation, i.e. the difference of each channel from the
    largest one. The hue is rotated about the gray axis by up to ``hue`` of the colour circle in either direction, which
    for such small angles nearly preserves saturation and value. Channels are clipped to 0..255. Without rotation and
    clipping, the result equals that of a conversion to HSV and back, in half the time.
    """

    def __init__(self, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> None:
        self.gains = np.array((hue, saturation, value))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Change the colours of the sample."""
        turn, saturation, value = rng.uniform(-1, 1, 3) * self.gains + (0, 1, 1)
        if not self.gains.any():
            return sample
        matrix = (saturation * value * rotation_about_gray(2 * np.pi * turn)).astype(np.float32)
        for top in range(0, len(sample.image), STRIP):  # strips stay in the processor's cache
            strip = sample.image[top : top + STRIP]
            red, green, blue = cv2.split(strip)
            largest = cv2.max(cv2.max(red, green, red), blue, red)
            below = cv2.cvtColor(largest, cv2.COLOR_GRAY2RGB)
            cv2.subtract(below, strip, below)  # difference of each channel from the largest
            cv2.transform(below, matrix, below)
            cv2.convertScaleAbs(largest, largest, value)
            cv2.cvtColor(largest, cv2.COLOR_GRAY2RGB, strip)
            cv2.subtract(strip, below, strip)
        return sample


def rotation_about_gray(angle: float) -> np.ndarray:
    """Return the (3, 3) matrix that rotates RGB colours by ``angle`` (radians) about the axis from black to white.

    Uses Rodrigues' formula; red rotates towards green.
    """
    cross = np.array(((0, -1, 1), (1, 0, -1), (-1, 1, 0))) / np.sqrt(3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@TRANSFORMS.register("flip")
class Flip:
    """Flip horizontally with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Flip the image and its boxes with probability ``p``."""
        if rng.random() < self.p:
            width = sample.image.shape[1]
            sample.image = cv2.flip(sample.image, 1)  # twenty times as fast as a copy of [:, ::-1]
            mirror, shift = np.array(((-1, 1, -1, 1), (width, 0, width, 0)), np.float32)
            sample.boxes = sample.boxes[:, (2, 1, 0, 3)] * mirror + shift
        return sample


class Albumentation:
    """One albumentations transform of images and boxes, applied with probability ``p``.

    If the size of the image changes, for example by a crop, it is letterboxed back to its original size. Boxes are
    clipped to the image, and dropped by the criteria of ``mosaic.clip_boxes``.

    Args:
        name: of an albumentations class.
        arguments: of the class, and ``p``.
        size: side of a square test image, with which errors are found before training starts.

    Raises:
        DetkitError: the class or an argument is unknown, or the transform fails on the test image.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], size: int) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # would check online for a newer version
        import albumentations

        cls = getattr(albumentations, name, None)
        if not (isinstance(cls, type) and issubclass(cls, albumentations.BasicTransform)):
            known = [n for n in dir(albumentations) if n[0].isupper()] + TRANSFORMS.names()
            raise DetkitError(f"augment.transforms: unknown transform '{name}'{nearest(name, known)}")
        accepted = inspect.signature(cls.__init__).parameters  # type: ignore[misc]  # not of a subclass
        for key in arguments:
            if key not in accepted:  # albumentations itself only warns
                raise DetkitError(f"augment.transforms: {name} takes no argument '{key}'{nearest(key, accepted)}")
        try:
            transform = cls(**{**arguments, "p": 1.0})
        except Exception as error:  # transforms raise all kinds of errors
            given = dict(arguments)
            raise DetkitError(f"augment.transforms: {name} rejects its arguments {given}: {_one_line(error)}") from None
        if transform.targets_as_params:
            needs = ", ".join(transform.targets_as_params)
            raise DetkitError(
                f"augment.transforms: {name} needs {needs} for every image, which detkit does not provide; remove it"
            )
        moves_boxes = isinstance(transform, albumentations.DualTransform)
        boxes = albumentations.BboxParams(
            "pascal_voc",
            label_fields=["labels"],
            min_width=MIN_SIDE,
            min_height=MIN_SIDE,
            min_visibility=MIN_VISIBLE,
            max_accept_ratio=MAX_ASPECT,
            clip=True,
            filter_invalid_bboxes=True,
        )
        self.compose = albumentations.Compose([transform], bbox_params=boxes if moves_boxes else None)
        self.name = name
        self.p = arguments.get("p", 0.5)
        blank = Sample(
            np.full((size, size, 3), PAD_VALUE, np.uint8),
            np.array([[size / 4, size / 4, size / 2, size / 2]], np.float32),
            np.zeros(1, np.int64),
            ImageMeta(0, Path(), (size, size)),
        )
        self.apply(blank, np.random.default_rng(0))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Transform the sample with probability ``p``."""
        return self.apply(sample, rng) if rng.random() < self.p else sample

    def apply(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Transform the sample; the transform is seeded from ``rng``.

        Raises:
            DetkitError: the transform fails, or does not return a uint8 RGB image.
        """
        size = sample.image.shape[:2]
        self.compose.set_random_seed(int(rng.integers(2**31)))
        try:
            result = self.compose(image=sample.image, bboxes=sample.boxes, labels=sample.labels)
        except Exception as error:  # as above
            shape = f"an image of {size[1]}x{size[0]} pixels"
            raise DetkitError(f"augment.transforms: {self.name} fails on {shape}: {_one_line(error)}") from None
        image = result["image"]
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,)):
            raise DetkitError(
                f"augment.transforms: {self.name} does not return a uint8 RGB image; remove it, "
                "detkit itself converts images to the network's input"
            )
        sample.image = image
        sample.boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        sample.labels = np.asarray(result["labels"], np.int64)
        if image.shape[:2] != size:
            box = Letterbox.fit(image.shape[:2], size)
            sample.image = box.apply(image)
            sample.boxes = sample.boxes * np.array(box.scale * 2, np.float32) + np.array(box.offset * 2, np.float32)
        return sample


def build_transform(name: str, arguments: Mapping[str, Any] | None, size: int = 640) -> Transform:
    """Build a transform of ``augment.transforms``.

    Args:
        name: of a detkit transform, or an albumentations class.
        arguments: its keyword arguments.
        size: side of the training images in pixels.

    Raises:
        DetkitError: the transform is unknown, or its arguments are invalid.
    """
    if not isinstance(arguments, Mapping | None):
        raise DetkitError(
            f"augment.transforms.{name}={arguments} must be a mapping of arguments, for example {{p: 0.5}}"
        )
    arguments = dict(arguments or {})
    p = arguments.get("p", 1)
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        raise DetkitError(f"augment.transforms.{name}.p={p} must be a number from 0 to 1")
    if name in TRANSFORMS.names():
        return TRANSFORMS.build({"name": name, **arguments})
    return Albumentation(name, arguments, size)


def _one_line(error: Exception) -> str:
    """Return an error message on one line, without pydantic's details and links."""
    lines = (line.partition(" [type=")[0].strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if not line.startswith("For further information")) or type(error).__name__
