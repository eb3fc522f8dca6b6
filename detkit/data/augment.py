"""The training view of a data set: mosaic, affine and the transforms of ``configs/augment``.

``Augmentation`` makes samples of images, wherever these come from; ``AugmentedDataset`` takes them from a set whose
images have numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detkit.data.dataset import DetectionDataset
from detkit.data.mosaic import compose
from detkit.data.transforms import build_transform
from detkit.structures import Sample


class Augmentation:
    """Makes a training sample of an image and, for a mosaic, of partners.

    Args:
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, off_epochs}, ``affine`` {scale, translate}, ``transforms`` {name: arguments}.
        epochs: of the run; the mosaic stays off in the last ``off_epochs``.
    """

    def __init__(self, size: int, augment: Mapping[str, Any], epochs: int) -> None:
        self.size = size
        self.mosaic_p = augment["mosaic"]["p"]
        self.mosaic_epochs = epochs - augment["mosaic"]["off_epochs"]
        self.affine = augment["affine"]
        self.transforms = [build_transform(name, args) for name, args in augment["transforms"].items()]

    def __call__(self, sample: Sample, draw: Callable[[], Sample], rng: np.random.Generator, epoch: int) -> Sample:
        """Return ``sample`` as the network sees it in ``epoch``; ``draw`` returns a partner at random."""
        samples = [sample]
        if rng.random() < self.mosaic_p and epoch < self.mosaic_epochs:
            samples += [draw(), draw(), draw()]
        sample = compose(samples, self.size, rng, self.affine["scale"], self.affine["translate"])
        for transform in self.transforms:
            sample = transform(sample, rng)
        return sample


class AugmentedDataset(Dataset):
    """Samples of ``size`` x ``size`` pixels, a function of (seed, epoch, index) alone.

    Args:
        dataset: the raw images.
        size, augment, epochs: see Augmentation.
        seed: of the run.
    """

    def __init__(
        self, dataset: DetectionDataset, size: int, augment: Mapping[str, Any], seed: int, epochs: int
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.augmentation = Augmentation(size, augment, epochs)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return image ``key[1]`` as the network sees it in epoch ``key[0]``."""
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.augmentation(
            self.dataset[key], lambda: self.dataset[epoch, int(rng.integers(len(self)))], rng, epoch
        )
