"""From a dataset to batches: order, worker processes, stacking."""

import os
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detkit.errors import DetkitError
from detkit.structures import Batch, Sample


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields ``(epoch, index)`` keys, shuffled by (seed, epoch); set ``epoch`` before each pass.

    The epoch travels in the key, so worker processes that outlive an epoch know which one they serve.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        return ((self.epoch, int(index)) for index in order)


class BatchLoader:
    """Iterates over a dataset in batches, by ``workers`` processes.

    Args:
        workers: number of processes; 0 loads in this one.
        seed, shuffle: of the order; see EpochSampler.
        pin: copy batches to page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        workers: int,
        seed: int = 0,
        shuffle: bool = False,
        pin: bool = False,
    ) -> None:
        self.sampler = EpochSampler(len(dataset), seed, shuffle)
        self.loader = DataLoader(
            _Guarded(dataset),
            batch_size,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Raises:
            DetkitError: a sample could not be made, in whatever process that was.
        """
        self.sampler.epoch = epoch
        for batch in self.loader:
            if isinstance(batch, DetkitError):
                raise DetkitError(str(batch))  # not itself: a cycle with this frame would make the workers end late
            yield batch


def worker_count(workers: int | str) -> int:
    """Return the number of loader processes; ``"auto"`` is one a core, 8 at most."""
    return min(8, os.cpu_count() or 1) if workers == "auto" else int(workers)


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size, padding their boxes to the longest list."""
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)  # channels-last as it is
    longest = max(len(s.labels) for s in samples)
    boxes = torch.zeros(len(samples), longest, 4)
    labels = torch.zeros(len(samples), longest, dtype=torch.int64)
    valid = torch.zeros(len(samples), longest, dtype=torch.bool)
    for i, sample in enumerate(samples):
        n = len(sample.labels)
        boxes[i, :n] = torch.from_numpy(sample.boxes)
        labels[i, :n] = torch.from_numpy(sample.labels)
        valid[i, :n] = True
    return Batch(images, boxes, labels, valid, [s.origin for s in samples])


class _Guarded(Dataset):
    """Hands a DetkitError on as a value: raised in a worker, it would arrive wrapped in that process' traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | DetkitError:
        try:
            return self.dataset[key]
        except DetkitError as error:
            return error


def _collate(items: list[Sample | DetkitError]) -> Batch | DetkitError:
    return next((item for item in items if isinstance(item, DetkitError)), None) or collate(items)


def _init_worker(_: int) -> None:
    cv2.setNumThreads(0)  # one process a core is enough
