"""The training view of a data set: mosaic, affine and the transforms of ``configs/augment``.

``Augmentation`` makes samples of images, wherever these come from; ``AugmentedDataset`` takes them from a set whose
images have numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detkit.data.dataset import DetectionDataset
from detkit.data.mosaic import Affine, compose
from detkit.data.transforms import build_transform
from detkit.structures import Sample

WINDOW = 16  # positions of a window of the epoch's order at least,
MAX_WINDOW = 32  # and at most


class Augmentation:
    """Makes a training sample of an image and, for a mosaic, of partners drawn from a pool.

    Args:
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, off_epochs}, ``affine`` {scale, translate, degrees, shear}, ``transforms`` {name:
            arguments}.
        epochs: of the run; the mosaic stays off in the last ``off_epochs``.
    """

    def __init__(self, size: int, augment: Mapping[str, Any], epochs: int) -> None:
        self.size = size
        self.mosaic_p = augment["mosaic"]["p"]
        self.mosaic_epochs = epochs - augment["mosaic"]["off_epochs"]
        self.affine = Affine(**augment["affine"])
        self.transforms = [build_transform(name, args) for name, args in augment["transforms"].items()]

    def __call__(self, sample: Sample, draw: Callable[[], Sample], rng: np.random.Generator, epoch: int) -> Sample:
        """Return ``sample`` as the network sees it in ``epoch``: (size, size, 3), pixels of its own.

        Args:
            draw: returns a partner, as it was decoded, at random.
            rng: what everything here is drawn from.
        """
        mosaic = rng.random() < self.mosaic_p and epoch < self.mosaic_epochs
        result = self._place(sample, draw, rng, mosaic)
        # What joins whole pictures (mixup, copy-paste) goes here; partners are self._place(draw(), draw, rng, mosaic).
        for transform in self.transforms:
            result = transform(result, rng)
        return result

    def _place(self, sample: Sample, draw: Callable[[], Sample], rng: np.random.Generator, mosaic: bool) -> Sample:
        """Return the image alone in its frame, or in a mosaic with three partners."""
        samples = [sample, draw(), draw(), draw()] if mosaic else [sample]
        return compose(samples, self.size, rng, self.affine)


class AugmentedDataset(Dataset):
    """Samples of ``size`` x ``size`` pixels, a function of the seed and the key alone.

    Args:
        dataset: the images.
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

    def __getitem__(self, key: tuple) -> Sample:
        """Return the sample of a key ``(epoch, index)``, its partners drawn from the whole set, or of a key
        ``(epoch, index, indices)``, from those indices alone."""
        epoch, index, *window = key
        pool = window[0] if window else range(len(self))
        rng = np.random.default_rng((self.seed, epoch, index))
        return self.augmentation(
            self.dataset[epoch, index], lambda: self.dataset[epoch, pool[rng.integers(len(pool))]], rng, epoch
        )


def partner_window(partners: str, dataset: DetectionDataset, batch_size: int) -> int:
    """Return how many positions of an epoch's order share their partners; 0 where these come from the whole set.

    Decoding four images a sample would take longer than all the rest. From a window of the order each image is
    decoded once, as whoever makes its batch still remembers it; so it is whole batches long, or whole in a batch.

    Args:
        partners: ``augment.mosaic.partners``: ``set``, ``window``, or ``auto``: ``set`` where the images are in memory.
    """
    if partners == "set" or (partners == "auto" and dataset.in_memory):
        return 0
    sizes = range(WINDOW, MAX_WINDOW + 1)
    return next((n for n in sizes if n % batch_size == 0 or batch_size % n == 0), WINDOW)
