"""The training view of a data set: mosaic, affine and the transforms of ``configs/augment``."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detkit.data.dataset import DetectionDataset
from detkit.data.mosaic import compose
from detkit.data.transforms import build_transform
from detkit.structures import Sample


class AugmentedDataset(Dataset):
    """Samples of ``size`` x ``size`` pixels, a function of (seed, epoch, index) alone.

    Args:
        dataset: the raw images.
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, off_epochs}, ``affine`` {scale, translate}, ``transforms`` {name: arguments}.
        seed: of the run.
        epochs: of the run; the mosaic stays off in the last ``off_epochs``.
    """

    def __init__(
        self, dataset: DetectionDataset, size: int, augment: Mapping[str, Any], seed: int, epochs: int
    ) -> None:
        self.dataset = dataset
        self.size = size
        self.seed = seed
        self.mosaic_p = augment["mosaic"]["p"]
        self.mosaic_epochs = epochs - augment["mosaic"]["off_epochs"]
        self.affine = augment["affine"]
        self.transforms = [build_transform(name, args) for name, args in augment["transforms"].items()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return image ``key[1]`` as the network sees it in epoch ``key[0]``."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        indices = [index]
        if rng.random() < self.mosaic_p and epoch < self.mosaic_epochs:
            indices.extend(rng.integers(len(self), size=3))
        samples = [self.dataset[epoch, i] for i in indices]
        sample = compose(samples, self.size, rng, self.affine["scale"], self.affine["translate"])
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample
