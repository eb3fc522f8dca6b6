"""The training view of a data set: mosaic, affine, copy-paste, mixup and the transforms of ``configs/augment``."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detkit.data.copy_paste import paste_objects
from detkit.data.dataset import DetectionDataset
from detkit.data.mixup import mixup
from detkit.data.mosaic import compose
from detkit.data.tiles import TiledDataset
from detkit.data.transforms import build_transform
from detkit.structures import Key, Sample


class AugmentedDataset(Dataset):
    """Samples of ``size`` x ``size`` pixels, a function of (seed, epoch, index) alone.

    Args:
        dataset: the raw images, and perhaps their tiles.
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, off_epochs}, ``affine`` {scale, translate}, ``copy_paste`` {p, max_objects, max_side},
            ``mixup`` {p, alpha}, ``transforms`` {name: arguments}.
        seed: of the run.
        epochs: of the run; mosaic, copy-paste and mixup stay off in the last ``off_epochs``.
    """

    def __init__(
        self, dataset: DetectionDataset | TiledDataset, size: int, augment: Mapping[str, Any], seed: int, epochs: int
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.mosaic_p = augment["mosaic"]["p"]
        self.mosaic_epochs = epochs - augment["mosaic"]["off_epochs"]
        self.affine = augment["affine"]
        self.copy_paste = augment["copy_paste"]
        self.mixup = augment["mixup"]
        self.transforms = [build_transform(name, args, size) for name, args in augment["transforms"].items()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | tuple[int, int]) -> Sample:
        """Return item ``key[1]`` as the network sees it in epoch ``key[0]``."""
        epoch, index, repeat = Key(*key)
        rng = np.random.default_rng((self.seed, epoch, index, repeat))
        mixes = epoch < self.mosaic_epochs
        indices = [index]
        if rng.random() < self.mosaic_p and mixes:
            indices.extend(rng.integers(len(self), size=3))
        sample = self._compose([self.dataset[epoch, i] for i in indices], rng)
        if mixes and _happens(self.copy_paste["p"], rng):
            donor = self._compose([self.dataset[epoch, rng.integers(len(self))]], rng)
            limits = {name: self.copy_paste[name] for name in ("max_objects", "max_side")}
            sample = paste_objects(sample, donor, rng, **limits)
        if mixes and _happens(self.mixup["p"], rng):
            other = self._compose([self.dataset[epoch, rng.integers(len(self))]], rng)
            sample = mixup(sample, other, rng, self.mixup["alpha"])
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample

    def _compose(self, samples: list[Sample], rng: np.random.Generator) -> Sample:
        return compose(samples, self.size, rng, self.affine["scale"], self.affine["translate"])


def _happens(p: float, rng: np.random.Generator) -> bool:
    """Draw whether something of probability ``p`` happens; nothing is drawn where ``p`` is 0."""
    return p > 0 and rng.random() < p
