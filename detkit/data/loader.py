"""Loading batches: sampling order, worker processes, collation."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from detkit.data.sampling import draw_items, epoch_length
from detkit.data.workers import TIMEOUT, Workers, init_worker, to_shared_memory, worker_context
from detkit.distributed.collectives import world_size
from detkit.errors import DetkitError, UnreadableImage
from detkit.structures import Batch, Sample, SampleKey


class EpochSampler(Sampler[SampleKey]):
    """Yields keys (epoch, index, repeat), shuffled by (seed, epoch); set ``epoch`` before each pass.

    The key contains the epoch, so that persistent worker processes know the current one.

    Args:
        length: of the data set.
        seed: of the order.
        shuffle: whether to shuffle the order.
        expected: (length,) expected number of draws of each index (``sampling.expected_draws``); None for once each.
        window: number of consecutive positions that form each other's ``SampleKey.mosaic_pool``; the last window of an
            epoch overlaps the previous one. 0 for no pool.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = True,
        expected: np.ndarray | None = None,
        window: int = 0,
    ) -> None:
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.expected = expected
        self.window = window
        self.epoch = 0

    def __len__(self) -> int:
        return self.length if self.expected is None else epoch_length(self.expected)

    def __iter__(self) -> Iterator[SampleKey]:
        rng = np.random.default_rng((self.seed, self.epoch))
        items, repeats = np.arange(self.length), np.zeros(self.length, np.int64)
        if self.expected is not None:
            items, repeats = draw_items(self.expected, rng)
        order = np.arange(len(items))
        if self.shuffle:
            rng.shuffle(order)
        items, repeats = items[order].tolist(), repeats[order].tolist()
        width = self.window or len(items)
        for start in range(0, len(items), width):
            stop = min(start + width, len(items))
            partners = items[max(stop - width, 0) : stop] if self.window else None
            for k in range(start, stop):
                yield SampleKey(self.epoch, items[k], repeats[k], partners)


class BatchSampler(Sampler[list[SampleKey]]):
    """Yields the keys of every batch, or this rank's part: together, the ranks see the batches of a single process.

    A smaller last batch is split as evenly as possible; a rank may get an empty list.

    Args:
        sampler: the order.
        batch_size: total over all ranks.
        starts: positions at which batches begin; None for every ``batch_size``.

    Attributes:
        skip: number of batches to skip at the start of an epoch; set it before each pass.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, starts: Sequence[int] | None = None) -> None:
        self.skip = 0
        self.sampler = sampler
        self.starts = range(0, len(sampler), batch_size) if starts is None else starts
        self.ranks = world_size()
        self.rank = dist.get_rank() if self.ranks > 1 else 0

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        bounds = [*self.starts, len(self.sampler)][min(self.skip, len(self)) :]
        keys = islice(self.sampler, bounds[0], None)
        for start, stop in pairwise(bounds):
            batch = [*islice(keys, stop - start)]
            first, last = (-(-len(batch) * rank // self.ranks) for rank in (self.rank, self.rank + 1))
            yield batch[first:last]


class BatchLoader:
    """Iterates over a dataset in batches, or this rank's part of them, with ``workers`` processes.

    Args:
        dataset: maps a ``SampleKey`` to a Sample.
        batch_size: total over all ranks.
        workers: number of processes; 0 loads in this process.
        seed: see EpochSampler.
        shuffle: see EpochSampler.
        expected: see EpochSampler.
        pin: copy batches to page-locked memory, for a GPU.
        window: see EpochSampler.
        starts: see BatchSampler.
        timeout: seconds to wait for a batch.
    """

    def __init__(  # noqa: PLR0913  (keywords, as of torch's DataLoader)
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        workers: int,
        seed: int = 0,
        shuffle: bool = False,
        expected: np.ndarray | None = None,
        pin: bool = False,
        window: int = 0,
        starts: Sequence[int] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        length = len(dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its subclasses
        self.sampler = EpochSampler(length, seed, shuffle, expected, window)
        self.batches = BatchSampler(self.sampler, batch_size, starts)
        self.issues: list[str] = []
        loader = DataLoader(
            _ErrorsAsValues(dataset),
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_collate_or_error,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # so that the model's random numbers do not depend on the workers
            multiprocessing_context=worker_context(workers),
        )
        self.workers = Workers(loader, timeout)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Number of samples per epoch, over all ranks."""
        return len(self.sampler)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; unreadable images are left out and reported in ``batch.issues``.

        Args:
            epoch: from 0.
            skip: ``position`` of the last batch to skip, when resuming within an epoch.

        Raises:
            DetkitError: a sample failed for another reason, in any process, or no image can be read.
            WorkersLost: a worker process died, or there was no batch within the timeout.
        """
        self.sampler.epoch, self.batches.skip = epoch, skip
        yield from collect_batches(self.workers, self.issues, skip)


def collect_batches(
    results: Iterable[tuple[Batch | DetkitError | None, list[str]]], issues: list[str], skip: int
) -> Iterator[Batch]:
    """Yield the batches of the worker processes, with the problems since the previous batch.

    A batch without any readable image is skipped. With several ranks an empty batch is yielded instead, as all ranks
    need the same number of batches.

    Args:
        results: pairs of a batch (None without any sample, or an error) and messages about unreadable images.
        issues: buffer of the messages for the next batch.
        skip: position in the epoch before the first of ``results``.

    Raises:
        DetkitError: an error in place of a batch, or there was no batch at all.
    """
    empty = world_size() == 1 and skip == 0  # one of several ranks may have no image
    for position, (batch, messages) in enumerate(results, 1 + skip):
        issues += messages
        if isinstance(batch, DetkitError):
            raise type(batch)(str(batch))  # a copy: a reference cycle with this frame would delay the workers' end
        empty = empty and batch is None
        if batch is None and world_size() > 1:
            batch = Batch.empty()
        if batch is not None:
            batch.position = position
            batch.issues = issues.copy()
            issues.clear()
            yield batch
    if empty:
        first = issues[0] if issues else "there are none"
        raise DetkitError(f"no image of this epoch can be read; the first problem: {first}")


def worker_count(workers: int | str) -> int:
    """Return the number of loader processes; ``"auto"`` divides the cores among the node's ranks, at most 8."""
    if workers != "auto":
        return int(workers)
    return min(8, max((os.cpu_count() or 1) // local_ranks(), 1))


def reader_threads(workers: int | str) -> int:
    """Return the number of threads that read ahead of prediction; ``"auto"`` is ``worker_count``'s, at most 4."""
    return min(worker_count(workers), 4) if workers == "auto" else int(workers)


def local_ranks() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of equal image size, padding boxes and labels to the largest number of boxes."""
    images = torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2)  # stays channels-last
    longest = max(len(s.labels) for s in samples)
    boxes = torch.zeros(len(samples), longest, 4)
    labels = torch.zeros(len(samples), longest, dtype=torch.int64)
    valid = torch.zeros(len(samples), longest, dtype=torch.bool)
    for i, sample in enumerate(samples):
        n = len(sample.labels)
        boxes[i, :n] = torch.from_numpy(sample.boxes)
        labels[i, :n] = torch.from_numpy(sample.labels)
        valid[i, :n] = True
    return Batch(images, boxes, labels, valid, [s.meta for s in samples])


class _ErrorsAsValues(Dataset):
    """Returns a DetkitError as a value: raised in a worker, it would arrive wrapped in that process' traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample | DetkitError:
        try:
            return self.dataset[key]
        except DetkitError as error:
            return error


def _collate_or_error(items: list[Sample | DetkitError]) -> tuple[Batch | DetkitError | None, list[str]]:
    issues = [str(item) for item in items if isinstance(item, UnreadableImage)]
    fault = next((e for e in items if isinstance(e, DetkitError) and not isinstance(e, UnreadableImage)), None)
    samples = [item for item in items if isinstance(item, Sample)]
    try:
        return fault or (to_shared_memory(collate(samples)) if samples else None), issues
    except DetkitError as error:
        return error, issues
