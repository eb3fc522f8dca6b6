"""Training batches from tar shards, which are read sequentially in few long reads.

Each epoch shuffles the shards and concatenates their images into one sequence. Each rank reads an equal slice of the
sequence, and each of its worker processes a slice of whole batches, independent of shard boundaries. Every image is
therefore seen exactly once, all ranks have the same number of batches, and there may be fewer shards than processes.
Offsets of images in their shards and labels come from the index. A buffer shuffles the images.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from itertools import chain, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from detkit.data.dataset import DetectionDataset
from detkit.data.loader import collate, collect_batches
from detkit.data.workers import TIMEOUT, Workers, init_worker, to_shared_memory, worker_context
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import rank
from detkit.errors import DetkitError, UnreadableImage
from detkit.ops.files import open_regular
from detkit.ops.image import tar_member
from detkit.structures import Batch, Sample

READ_BYTES = 2**20  # per read of a shard
BUFFER_BYTES = 2**26  # of encoded images in a worker's shuffle buffer
BUFFER_START = 100  # images in the buffer before the first is drawn
PARTNERS = 32  # decoded images in a worker's pool of mosaic partners

Augment = Callable[[Sample, Callable[[], Sample], np.random.Generator, int], Sample]
EncodedImage = tuple[int, bytes]  # index in the data set, content of the file


class ShardLoader:
    """Iterates over a data set of tar shards in augmented batches, with ``workers`` processes on each rank.

    Args:
        dataset: of images in shards.
        augment: maps (image, function that draws a partner, generator, epoch) to a training sample.
        batch_size: per rank.
        workers: see BatchLoader.
        seed: of order and augmentation.
        pin: see BatchLoader.
        timeout: see BatchLoader.

    Raises:
        DetkitError: there are too few images to give every rank the same number of batches.
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
        self.stream = ShardStream(dataset, augment, batch_size, seed, rank(), world_size())
        self.issues: list[str] = []  # not yet delivered with a batch
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
        return len(self.stream.batch_bounds) - 1

    @property
    def samples(self) -> int:
        """Number of samples per epoch, over all ranks."""
        return len(self.stream.dataset)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; unreadable images are left out and reported in ``batch.issues``.

        Args:
            epoch: from 0.
            skip: number of batches to skip, when resuming with the same number of workers; their images are read and
                decoded again, as they affect the shuffle buffer.

        Raises:
            DetkitError: a sample failed, in any process, or no image can be read.
            WorkersLost: a worker process died, or there was no batch within the timeout.
        """
        self.stream.progress.copy_(torch.tensor([epoch, skip]))
        yield from collect_batches(islice(self.workers, skip, None), self.issues, skip)


class ShardStream(IterableDataset):
    """Yields one worker's ``(batch, messages)`` of an epoch, with a DetkitError in place of a batch that failed.

    Attributes:
        progress: (2,) int64, the epoch and the number of its batches to skip, in shared memory, so that persistent
            worker processes see changes.
        batch_bounds: (K + 1,) boundaries of the batches in the rank's slice of images.
    """

    def __init__(
        self, dataset: DetectionDataset, augment: Augment, batch_size: int, seed: int, rank: int, ranks: int
    ) -> None:
        self.dataset, self.augment = dataset, augment
        self.seed = seed
        self.progress = torch.zeros(2, dtype=torch.int64).share_memory_()
        count = len(dataset)
        self.begin = count * rank // ranks
        self.batch_bounds = cut_batches(count * (rank + 1) // ranks - self.begin, -(-count // ranks), batch_size)
        if self.batch_bounds[0] < 0:
            raise DetkitError(f"{count} images are too few for batch_size={batch_size} on {ranks} processes")
        self.shard_bounds = self._shard_bounds()

    def __iter__(self) -> Iterator[tuple[Batch | DetkitError | None, list[str]]]:
        worker, workers = (info.id, info.num_workers) if (info := get_worker_info()) else (0, 1)
        epoch, skip = self.progress.tolist()
        batches = len(self.batch_bounds) - 1
        worker_bounds = [batches * k // workers for k in range(workers + 1)]
        bounds = self.batch_bounds[worker_bounds[worker] : worker_bounds[worker + 1] + 1]
        turns = sorted((turn, k) for k in range(workers) for turn in range(worker_bounds[k + 1] - worker_bounds[k]))
        skip = [k for _, k in turns[:skip]].count(worker)  # of this worker; workers alternate
        issues: list[str] = []
        begin, end = self.begin + int(bounds[0]), self.begin + int(bounds[-1])
        rng = np.random.default_rng((self.seed, epoch, begin))
        images = shuffled(self._encoded(epoch, begin, end, issues), rng)
        samples = self._augmented(self._decoded(images, issues), epoch, rng, int(bounds[skip] - bounds[0]))
        for _ in range(skip):
            yield None, []
        for size in np.diff(bounds[skip:]):
            try:
                batch = [*islice(samples, int(size))]
                yield to_shared_memory(collate(batch)) if batch else None, issues.copy()
            except DetkitError as error:  # raised here, it would arrive wrapped in this process' traceback
                yield error, issues.copy()
            issues.clear()

    def _encoded(self, epoch: int, begin: int, end: int, issues: list[str]) -> Iterator[EncodedImage]:
        """Yield the images ``begin`` to ``end`` of the epoch's sequence."""
        position = 0
        for shard in np.random.default_rng((self.seed, epoch)).permutation(len(self.shard_bounds) - 1):
            first, last = self.shard_bounds[shard], self.shard_bounds[shard + 1]
            low, high = (min(max(row - position + first, first), last) for row in (begin, end))
            position += last - first
            if low < high:
                yield from self._read(low, high, issues)

    def _read(self, low: int, high: int, issues: list[str]) -> Iterator[EncodedImage]:
        """Yield images ``low`` to ``high`` of one shard, in the order in which they are stored."""
        row = low
        try:
            with open_regular(self._member(low)[0]) as file:
                # A seek within the buffer does not read.
                stream = BufferedReader(file, READ_BYTES)
                for row in range(low, high):
                    _, offset, size = self._member(row)
                    stream.seek(offset)
                    data = stream.read(size)
                    if len(data) < size:
                        raise OSError("the file ends early")
                    yield row, data
        except OSError as error:
            shard, name = self._member(row)[0], self.dataset.annotations.paths[row].name
            reason = error.strerror or error
            issues.append(f"{shard}: {high - row} images are skipped, beginning with {name}: {reason}")

    def _member(self, row: int) -> tuple[str, int, int]:
        """Return the shard of an image, and its offset and size there in bytes."""
        member = tar_member(self.dataset.annotations.paths[row])
        assert member is not None, "all images are in shards"
        return member

    def _shard_bounds(self) -> list[int]:
        """Return the index of the first image of each shard, and finally the number of images."""
        bounds = [0]
        while bounds[-1] < len(self.dataset):
            bounds.append(self._shard_end(bounds[-1]))
        return bounds

    def _shard_end(self, row: int) -> int:
        """Return the index of the first image after ``row`` that is in another shard."""
        shard = self._member(row)[0]
        return bisect_left(range(len(self.dataset)), True, row, key=lambda other: self._member(other)[0] != shard)

    def _decoded(self, images: Iterator[EncodedImage], issues: list[str]) -> Iterator[Sample]:
        for row, data in images:
            try:
                yield self.dataset.decode(row, np.frombuffer(data, np.uint8))
            except UnreadableImage as error:
                issues.append(str(error))

    def _augmented(
        self, samples: Iterator[Sample], epoch: int, rng: np.random.Generator, skip: int
    ) -> Iterator[Sample]:
        """Yield training samples after the first ``skip``; partners are drawn from recent images.

        The random numbers of an image depend on (seed, epoch, index) only, its partners on the worker process.
        """
        pool = [*islice(samples, PARTNERS)]

        def partner(rng: np.random.Generator) -> Sample:
            return pool[rng.integers(len(pool))]

        for k, sample in enumerate(chain(tuple(pool), samples)):
            if k >= skip:
                sample_rng = np.random.default_rng((self.seed, epoch, sample.meta.index))
                yield self.augment(sample, partial(partner, sample_rng), sample_rng, epoch)
            pool[rng.integers(len(pool))] = sample


def cut_batches(count: int, most: int, batch_size: int) -> np.ndarray:
    """Split ``count`` images into as many batches as a rank with ``most`` images has.

    All batches except the last are full, unless the last would be empty: then the previous ones are one image smaller.

    Returns:
        (K + 1,) int64 boundaries from 0 to ``count``; the first is negative if there are fewer images than batches.
    """
    batches = -(-most // batch_size)
    number = np.arange(batches + 1)
    return np.minimum(number * batch_size, count - (batches - number))


def shuffled(images: Iterable[EncodedImage], rng: np.random.Generator) -> Iterator[EncodedImage]:
    """Yield images in random order, using a buffer of at most BUFFER_BYTES (or one image that is larger).

    The buffer fills gradually, two images in for each one out, so that the first batch does not wait for it to be full.
    """
    buffer: list[EncodedImage] = []
    buffered_bytes = 0
    for count, image in enumerate(images):
        buffer.append(image)
        buffered_bytes += len(image[1])
        while buffered_bytes > BUFFER_BYTES or len(buffer) > max(BUFFER_START, count // 2):
            k = int(rng.integers(len(buffer)))
            buffer[k], buffer[-1] = buffer[-1], buffer[k]
            buffered_bytes -= len(buffer[-1][1])
            yield buffer.pop()
    yield from (buffer[k] for k in rng.permutation(len(buffer)))
