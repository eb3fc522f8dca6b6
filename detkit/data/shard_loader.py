"""Training batches from tar shards, read as streams: a disk or network drive sees few long reads instead of many.

An epoch puts the shards into a random order and lays their images end to end. Each rank takes an equal stretch of
that line and each of its worker processes a stretch of whole batches, wherever shards begin and end: so every image
comes exactly once, all ranks have the same number of batches, and there may be fewer shards than processes. Images
are mixed by a buffer as they come; the labels are those of the index.
"""

import tarfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline, shuffle
from webdataset.tariterators import tar_file_iterator
from webdataset.utils import pytorch_worker_info

from detkit.data.dataset import DetectionDataset
from detkit.data.formats.tar_shards import TAR_ERRORS, member_name
from detkit.data.loader import collate, made_batches
from detkit.data.workers import TIMEOUT, Workers, init_worker, share, worker_context
from detkit.errors import DetkitError, UnreadableImage
from detkit.ops.files import open_regular
from detkit.ops.image import tar_member
from detkit.structures import Batch, Sample

BUFFER_BYTES = 2**26  # of encoded images that a worker draws the next one from
PARTNERS = 32  # decoded images that a worker draws mosaic partners from

Augment = Callable[[Sample, Callable[[], Sample], np.random.Generator, int], Sample]


class ShardLoader:
    """Iterates over a webdataset set in augmented batches, by ``workers`` processes on each rank.

    The rank is that of RANK and WORLD_SIZE in the environment, or of torch.distributed.

    Args:
        augment: makes a training sample of (image, function that draws a partner, generator, epoch).
        batch_size: of one rank.
        workers, seed, pin, timeout: as for BatchLoader.

    Raises:
        DetkitError: there are too few images to give every rank as many batches.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        augment: Augment,
        batch_size: int,
        *,
        workers: int,
        seed: int = 0,
        pin: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        rank, ranks, *_ = pytorch_worker_info()
        self.stream = ShardStream(dataset, augment, batch_size, seed, rank, ranks)
        self.issues: list[str] = []  # not yet handed on with a batch
        loader = DataLoader(
            self.stream,
            batch_size=None,  # the stream makes whole batches
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # see BatchLoader
            multiprocessing_context=worker_context(workers),
        )
        self.workers = Workers(loader, timeout)

    def __len__(self) -> int:
        return len(self.stream.cuts) - 1

    @property
    def samples(self) -> int:
        """The number of samples of an epoch, over all ranks."""
        return len(self.stream.dataset)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; images that cannot be read are missing, and named in ``batch.issues``.

        Args:
            skip: leave out as many batches, which were had before by as many workers; their images are read and
                decoded again, as what comes after is mixed with them.

        Raises:
            DetkitError: a sample could not be made, in whatever process that was, or no image can be read.
            WorkersLost: a process has died, or there was no batch in time.
        """
        self.stream.place.copy_(torch.tensor([epoch, skip]))
        yield from made_batches(islice(self.workers, skip, None), self.issues, skip)


class ShardStream(IterableDataset):
    """Yields one worker's ``(batch, problems)`` of an epoch; the batch is a DetkitError where one could not be made.

    Attributes:
        place: (2,) int64, the epoch and the batches to leave out of it, in shared memory: worker processes that outlive
            an epoch see it change.
        cuts: (K + 1,) where the rank's stretch of images is cut into batches.
    """

    def __init__(
        self, dataset: DetectionDataset, augment: Augment, batch_size: int, seed: int, rank: int, ranks: int
    ) -> None:
        self.dataset, self.augment = dataset, augment
        self.seed = seed
        self.place = torch.zeros(2, dtype=torch.int64).share_memory_()
        count = len(dataset)
        self.begin = count * rank // ranks
        self.cuts = cut_batches(count * (rank + 1) // ranks - self.begin, -(-count // ranks), batch_size)
        if self.cuts[0] < 0:
            raise DetkitError(f"{count} images are too few for batch_size={batch_size} on {ranks} processes")
        self.bounds = _shard_bounds(dataset)
        sizes = [tar_member(dataset.annotations.paths[first])[2] for first in self.bounds[:-1]]
        self.buffer = int(np.clip(BUFFER_BYTES / np.mean(sizes), PARTNERS, 10_000))

    def __iter__(self) -> Iterator[tuple[Batch | DetkitError | None, list[str]]]:
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        epoch, skip = self.place.tolist()
        batches = len(self.cuts) - 1
        bounds = [batches * k // workers for k in range(workers + 1)]
        cuts = self.cuts[bounds[worker] : bounds[worker + 1] + 1]
        turns = sorted((turn, k) for k in range(workers) for turn in range(bounds[k + 1] - bounds[k]))
        skip = [k for _, k in turns[:skip]].count(worker)  # of this worker's: they take turns
        issues: list[str] = []
        rng = np.random.default_rng((self.seed, epoch, self.begin + int(cuts[0])))
        files = self._files(epoch, self.begin + int(cuts[0]), self.begin + int(cuts[-1]), issues)
        pipeline = DataPipeline(lambda: files, shuffle(self.buffer, seed=int(rng.integers(2**32))))
        samples = self._augmented(self._decoded(pipeline, issues), epoch, rng, int(cuts[skip] - cuts[0]))
        for _ in range(skip):
            yield None, []
        for size in np.diff(cuts[skip:]):
            try:
                batch = [*islice(samples, int(size))]
                yield share(collate(batch)) if batch else None, issues.copy()
            except DetkitError as error:  # raised here, it would arrive wrapped in this process' traceback
                yield error, issues.copy()
            issues.clear()

    def _files(self, epoch: int, begin: int, end: int, issues: list[str]) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of the images at ``begin`` to ``end`` of the epoch's line of shards."""
        position = 0
        for shard in np.random.default_rng((self.seed, epoch)).permutation(len(self.bounds) - 1):
            first, last = (int(row) for row in self.bounds[shard : shard + 2])
            low, high = (min(max(row - position + first, first), last) for row in (begin, end))
            position += last - first
            if low < high:
                yield from self._read(first, low, high, issues)

    def _read(self, first: int, low: int, high: int, issues: list[str]) -> Iterator[tuple[int, bytes]]:
        """Yield number and bytes of images ``low`` to ``high`` of the shard whose first image is ``first``.

        A tar file is a row of blocks, so a stretch of it is one, too: from the end of the image before.
        """
        paths = self.dataset.annotations.paths
        waiting = {path.name: (row, tar_member(path)[2]) for row, path in ((r, paths[r]) for r in range(low, high))}
        shard = tar_member(paths[low])[0]
        start = _end(paths[low - 1]) if low > first else 0
        words = "they are not where they were when the set was read"
        try:
            with open_regular(shard) as file:
                window = _Window(file, start, _end(paths[high - 1]))
                for member in tar_file_iterator(window, select_files=lambda name: member_name(name) in waiting):
                    row, size = waiting[member_name(member["fname"])]
                    if len(member["data"]) == size:
                        del waiting[member_name(member["fname"])]
                        yield row, member["data"]
        except (OSError, *TAR_ERRORS) as error:
            words = str(error).partition(" @ ")[0]  # the library adds the stream
        if waiting:
            issues.append(f"{shard}: {len(waiting)} images are skipped, beginning with {min(waiting)}: {words}")

    def _decoded(self, files: Iterator[tuple[int, bytes]], issues: list[str]) -> Iterator[Sample]:
        for row, data in files:
            try:
                yield self.dataset.decode(row, np.frombuffer(data, np.uint8))
            except UnreadableImage as error:
                issues.append(str(error))

    def _augmented(
        self, samples: Iterator[Sample], epoch: int, rng: np.random.Generator, skip: int
    ) -> Iterator[Sample]:
        """Yield training samples after the first ``skip``; partners are drawn from those that came shortly before.

        An image's own randomness depends on (seed, epoch, number) alone, its partners on the process that met them.
        """
        pool = [*islice(samples, PARTNERS)]
        for k, sample in enumerate(chain(tuple(pool), samples)):
            if k >= skip:
                own = np.random.default_rng((self.seed, epoch, sample.meta.index))
                yield self.augment(sample, lambda own=own: pool[own.integers(len(pool))], own, epoch)
            pool[rng.integers(len(pool))] = sample


def cut_batches(count: int, most: int, batch_size: int) -> np.ndarray:
    """Return where ``count`` images are cut into batches, as many as a rank with ``most`` of them has.

    All but the last are full, unless the last would be empty: then the one before gives it an image.

    Returns:
        (K + 1,) int64 from 0 to ``count``; the first is negative where there are fewer images than batches.
    """
    batches = -(-most // batch_size)
    number = np.arange(batches + 1)
    return np.minimum(number * batch_size, count - (batches - number))


def _shard_bounds(dataset: DetectionDataset) -> list[int]:
    """Return the number of each shard's first image, and at the end that of all images."""
    paths = dataset.annotations.paths
    bounds = [0]
    while (low := bounds[-1]) < len(paths):
        shard, high = tar_member(paths[low])[0], len(paths)
        while low + 1 < high:  # low is in the shard, high is not
            middle = (low + high) // 2
            low, high = (middle, high) if tar_member(paths[middle])[0] == shard else (low, middle)
        bounds.append(high)
    return bounds


def _end(path: Path) -> int:
    """Return where an image's last block ends in its tar file."""
    _, offset, size = tar_member(path)
    return offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Window:
    """A file's bytes ``start`` to ``stop``, to be read from end to end."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self.file, self.left = file, stop - start

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end."""
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data
