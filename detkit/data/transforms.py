"""Augmentations after the mosaic: each takes a Sample and a random generator and returns a Sample.

The sample is the transform's own: it may draw over the pixels and hand the same object back.

``build_transform`` knows detkit's own by their lower-case names and every albumentations transform by its class name.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from detkit.errors import DetkitError, nearest
from detkit.registry import Registry
from detkit.structures import Sample

Transform = Callable[[Sample, np.random.Generator], Sample]
TRANSFORMS = Registry("transform")
STRIP = 64  # rows that HSV works on at a time: they stay in the processor's cache


@TRANSFORMS.register("hsv")
class HSV:
    """Multiply hue, saturation and value by factors drawn from 1 - gain .. 1 + gain, one each a picture."""

    def __init__(self, hue: float = 0.015, saturation: float = 0.7, value: float = 0.4) -> None:
        self.gains = np.array((hue, saturation, value))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample with its colours changed; boxes as they were."""
        factors = 1 + rng.uniform(-1, 1, 3) * self.gains
        if not self.gains.any():
            return sample
        matrix = np.diag(factors)
        for top in range(0, len(sample.image), STRIP):
            strip = sample.image[top : top + STRIP]
            hsv = cv2.cvtColor(strip, cv2.COLOR_RGB2HSV)
            # A matrix is four times as fast as a table for each channel; a hue beyond 180 wraps on the way back.
            cv2.transform(hsv, matrix, dst=hsv)
            cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=strip)
        return sample


@TRANSFORMS.register("flip")
class Flip:
    """Mirror left and right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample, perhaps mirrored, boxes along with it."""
        if rng.random() < self.p:
            width = sample.image.shape[1]
            sample.image = cv2.flip(sample.image, 1)  # twenty times as fast as a copy of [:, ::-1]
            sample.boxes = sample.boxes[:, (2, 1, 0, 3)] * np.float32((-1, 1, -1, 1)) + np.float32((width, 0, width, 0))
        return sample


class Albumentation:
    """One albumentations transform, applied with probability ``p``; boxes are carried along."""

    def __init__(self, name: str, p: float = 0.5, **arguments: Any) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
        import albumentations

        cls = getattr(albumentations, name, None)
        if not (isinstance(cls, type) and issubclass(cls, albumentations.BasicTransform)):
            known = [n for n in dir(albumentations) if n[0].isupper()] + TRANSFORMS.names()
            raise DetkitError(f"augment.transforms: unknown transform '{name}'{nearest(name, known)}")
        accepted = inspect.signature(cls.__init__).parameters
        for key in arguments:
            if key not in accepted:  # albumentations itself only warns
                raise DetkitError(f"augment.transforms: {name} takes no argument '{key}'{nearest(key, accepted)}")
        try:
            transform = cls(p=1.0, **arguments)
        except (TypeError, ValueError) as error:
            raise DetkitError(f"augment.transforms: {name} refuses its arguments {arguments}: {error}") from None
        moves_boxes = isinstance(transform, albumentations.DualTransform)
        boxes = albumentations.BboxParams("pascal_voc", label_fields=["labels"]) if moves_boxes else None
        self.compose = albumentations.Compose([transform], bbox_params=boxes)
        self.p = p

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample, perhaps transformed, with the transform's own randomness drawn from ``rng``."""
        if rng.random() < self.p:
            self.compose.set_random_seed(int(rng.integers(2**31)))
            result = self.compose(image=sample.image, bboxes=sample.boxes, labels=sample.labels)
            sample.image = result["image"]
            sample.boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
            sample.labels = np.asarray(result["labels"], np.int64)
        return sample


def build_transform(name: str, arguments: Mapping[str, Any] | None) -> Transform:
    """Build a transform from its line in ``augment.transforms``: its name and keyword arguments.

    Raises:
        DetkitError: unknown to detkit and albumentations alike, or arguments it does not take.
    """
    arguments = dict(arguments or {})
    if name in TRANSFORMS.names():
        return TRANSFORMS.build({"name": name, **arguments})
    return Albumentation(name, **arguments)
