"""Training batches from tar shards, read from end to end: a disk or network drive sees few long reads, not many.

An epoch puts the shards into a random order and lays their images end to end. Each rank takes an equal stretch of
that line and each of its worker processes a stretch of whole batches, wherever shards begin and end: so every image
comes exactly once, all ranks have the same number of batches, and there may be fewer shards than processes. Where an
image lies in its shard is known from the index, as are its labels; images are mixed by a buffer as they come.
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

READ_BYTES = 2**20  # of a shard at a time
BUFFER_BYTES = 2**26  # of encoded images that a worker draws the next one from
BUFFER_START = 100  # images that are in the buffer before the first one leaves it
PARTNERS = 32  # decoded images that a worker draws mosaic partners from

Augment = Callable[[Sample, Callable[[], Sample], np.random.Generator, int], Sample]
EncodedImage = tuple[int, bytes]  # number in the set, content of the file


class ShardLoader:
    """Iterates over a webdataset set in augmented batches, by ``workers`` processes on each rank.

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
        self.stream = ShardStream(dataset, augment, batch_size, seed, rank(), world_size())
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
        return len(self.stream.batch_bounds) - 1

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
        self.stream.progress.copy_(torch.tensor([epoch, skip]))
        yield from collect_batches(islice(self.workers, skip, None), self.issues, skip)


class ShardStream(IterableDataset):
    """Yields one worker's ``(batch, problems)`` of an epoch; the batch is a DetkitError where one could not be made.

    Attributes:
        progress: (2,) int64, the epoch and the batches to leave out of it, in shared memory: worker processes that
            outlive an epoch see it change.
        batch_bounds: (K + 1,) where the rank's stretch of images is cut into batches.
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
        skip = [k for _, k in turns[:skip]].count(worker)  # of this worker's: they take turns
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
        """Yield the images at ``begin`` to ``end`` of the epoch's line of shards."""
        position = 0
        for shard in np.random.default_rng((self.seed, epoch)).permutation(len(self.shard_bounds) - 1):
            first, last = self.shard_bounds[shard], self.shard_bounds[shard + 1]
            low, high = (min(max(row - position + first, first), last) for row in (begin, end))
            position += last - first
            if low < high:
                yield from self._read(low, high, issues)

    def _read(self, low: int, high: int, issues: list[str]) -> Iterator[EncodedImage]:
        """Yield images ``low`` to ``high``, which are of one shard, in the order they lie there."""
        row = low
        try:
            with open_regular(self._member(low)[0]) as file:
                # A seek to what the buffer holds already reads nothing.
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
        """Return an image's shard, and its first byte and size there."""
        member = tar_member(self.dataset.annotations.paths[row])
        assert member is not None, "a set of shards has no image outside them"
        return member

    def _shard_bounds(self) -> list[int]:
        """Return the number of each shard's first image, and at the end that of all images."""
        bounds = [0]
        while bounds[-1] < len(self.dataset):
            bounds.append(self._shard_end(bounds[-1]))
        return bounds

    def _shard_end(self, row: int) -> int:
        """Return the number of the first image after ``row`` that is in another shard."""
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
        """Yield training samples after the first ``skip``; partners are drawn from those that came shortly before.

        An image's own randomness depends on (seed, epoch, number) alone, its partners on the process that met them.
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
    """Return where ``count`` images are cut into batches, as many as a rank with ``most`` of them has.

    All but the last are full, unless the last would be empty: then the one before gives it an image.

    Returns:
        (K + 1,) int64 from 0 to ``count``; the first is negative where there are fewer images than batches.
    """
    batches = -(-most // batch_size)
    number = np.arange(batches + 1)
    return np.minimum(number * batch_size, count - (batches - number))


def shuffled(images: Iterable[EncodedImage], rng: np.random.Generator) -> Iterator[EncodedImage]:
    """Yield images in a random order, each out of a buffer of BUFFER_BYTES (or of one image that is larger).

    The buffer fills by and by, as two images come for one that leaves: the first batch does not wait for it to be full.
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
