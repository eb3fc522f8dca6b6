"""From a dataset to batches: order, worker processes, stacking."""

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

    The epoch travels in the key, so worker processes that outlive an epoch know which one they serve.

    Args:
        length: of the data set.
        window: positions of the order that are each other's ``SampleKey.mosaic_pool``; the last window of an epoch
            overlaps the one before. 0: none are named.
        expected: (length,) how often each index is expected in an epoch (``sampling.expected_draws``); None for once.
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
    """Yields the keys of every batch, or this rank's share of each: together the ranks see the batches of one process.

    A last, smaller batch is shared as equally as it can be; a rank without any of it gets an empty list.

    Args:
        batch_size: of all ranks together.
        starts: where in the order batches begin; None: every ``batch_size``.

    Attributes:
        skip: batches at the start of an epoch that are left out; set it before each pass.
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
    """Iterates over a dataset in batches, or this rank's share of them, by ``workers`` processes.

    Args:
        batch_size: of all ranks together.
        workers: number of processes; 0 loads in this one.
        seed, shuffle, expected: of the order; see EpochSampler.
        starts: where in the order batches begin, if not every ``batch_size``.
        pin: copy batches to page-locked memory, for a GPU.
        window: positions of the order that a key names beside its own; 0: none. See EpochSampler.
        timeout: seconds to wait for a batch; see ``Workers``.
    """

    def __init__(
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
            generator=torch.Generator(),  # its own: the model's draws do not depend on the number of workers
            multiprocessing_context=worker_context(workers),
        )
        self.workers = Workers(loader, timeout)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """The number of samples of an epoch, over all ranks."""
        return len(self.sampler)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; images that cannot be read are missing, and named in ``batch.issues``.

        Args:
            skip: leave out the batches up to the one of this ``position``: they were had before.

        Raises:
            DetkitError: a sample could not be made for another reason, in whatever process that was, or none at all.
            WorkersLost: a process has died, or there was no batch in time.
        """
        self.sampler.epoch, self.batches.skip = epoch, skip
        yield from collect_batches(self.workers, self.issues, skip)


def collect_batches(
    results: Iterable[tuple[Batch | DetkitError | None, list[str]]], issues: list[str], skip: int
) -> Iterator[Batch]:
    """Yield what worker processes made, with the problems met since the batch before.

    Where nothing was made of a batch it is left out, but of several ranks, each of which has as many batches as the
    others, this one yields an empty batch.

    Args:
        results: a batch, None where no sample of it could be made, or a mistake; and sentences about images left out.
        problems: where sentences wait for the next batch.
        skip: position in the epoch before the first of ``results``.

    Raises:
        DetkitError: the mistake that came instead of a batch, or there was no batch at all.
    """
    empty = world_size() == 1 and skip == 0  # of several ranks, one may well have no image
    for position, (batch, messages) in enumerate(results, 1 + skip):
        issues += messages
        if isinstance(batch, DetkitError):
            raise type(batch)(str(batch))  # not itself: a cycle with this frame would make the workers end late
        empty = empty and batch is None
        if batch is None and world_size() > 1:
            batch = Batch.empty()
        if batch is not None:
            batch.position = position
            batch.issues = issues.copy()
            issues.clear()
            yield batch
    if empty:
        raise DetkitError(f"no image of this epoch can be read; the first: {issues[0] if issues else 'none there'}")


def worker_count(workers: int | str) -> int:
    """Return the number of loader processes; ``"auto"`` is one a core, 8 at most, shared by a node's ranks."""
    if workers != "auto":
        return int(workers)
    return min(8, max((os.cpu_count() or 1) // local_ranks(), 1))


def local_ranks() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's


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
    return Batch(images, boxes, labels, valid, [s.meta for s in samples])


class _ErrorsAsValues(Dataset):
    """Hands a DetkitError on as a value: raised in a worker, it would arrive wrapped in that process' traceback."""

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
