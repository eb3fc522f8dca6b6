"""Tiling of large training images at full resolution, for objects that would vanish when images are shrunk.

    items of the data set    [ N whole images | P tiles with objects | E of the empty tiles, others in each epoch ]

Validation uses whole images.
"""

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.data.augment.mosaic import clip_boxes
from detkit.data.dataset import DetectionDataset
from detkit.ops.geometry import image_windows
from detkit.structures import ImageMeta, Sample, SampleKey

MAX_PAIRS = 1 << 18  # boxes times tiles processed at once, to bound the memory


class TiledDataset(Dataset):
    """A data set and the tiles of its images that are larger than a tile.

    Boxes are clipped to their tile and dropped if too little of them is visible (``mosaic.clip_boxes``). Adjacent tiles
    overlap, so every object not larger than the overlap is complete in at least one tile.

    Args:
        dataset: the whole images; tiles are read from the files at full resolution, whatever its image size.
        size: side of a tile in pixels; tiles are smaller where the image is.
        overlap: minimum overlap of adjacent tiles as a fraction of ``size``.
        positive_fraction: fraction of an epoch's tiles with objects; the others are empty tiles, which alternate.
    """

    def __init__(
        self, dataset: DetectionDataset, size: int, overlap: float = 0.2, positive_fraction: float = 0.5
    ) -> None:
        self.dataset = dataset
        self.files = DetectionDataset(dataset.annotations)
        self.image_of_tile, self.windows, self._tile_labels = find_tiles(dataset.annotations, size, overlap)
        is_positive = np.zeros(len(self.windows), bool)
        is_positive[self._tile_labels[0]] = True
        self.positive_tiles, self.empty_tiles = np.flatnonzero(is_positive), np.flatnonzero(~is_positive)
        self.empty_slots = min(
            round(len(self.positive_tiles) * (1 - positive_fraction) / positive_fraction), len(self.empty_tiles)
        )

    @property
    def in_memory(self) -> bool:
        """Whether no whole image is decoded more than once; tiles always are."""
        return self.dataset.in_memory

    def __len__(self) -> int:
        return len(self.dataset) + len(self.positive_tiles) + self.empty_slots

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return item ``key[1]`` in epoch ``key[0]``, an image or a tile."""
        epoch, index = key[:2]
        if index < len(self.dataset):
            return self.dataset[key]
        tile = self.tile(epoch, index - len(self.dataset))
        sample = self.files[epoch, int(self.image_of_tile[tile])]
        window = self.windows[tile]
        x1, y1, x2, y2 = (int(v) for v in window)
        boxes, keep = clip_boxes(sample.boxes, window)
        meta = ImageMeta(sample.meta.index, sample.meta.path, sample.meta.size, offset=(-x1, -y1))
        boxes = (boxes - (x1, y1, x1, y1)).astype(np.float32)
        return Sample(sample.image[y1:y2, x1:x2].copy(), boxes, sample.labels[keep], meta)

    def tile(self, epoch: int, slot: int) -> int:
        """Return the index of the tile in ``slot``, counted after the whole images."""
        if slot < len(self.positive_tiles):
            return int(self.positive_tiles[slot])
        return int(
            self.empty_tiles[(slot - len(self.positive_tiles) + epoch * self.empty_slots) % len(self.empty_tiles)]
        )

    def labels_by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the item and the label of each visible box, (T,) each."""
        items, labels = self.dataset.labels_by_item()
        tiles, tile_labels = self._tile_labels
        slots = len(self.dataset) + np.searchsorted(self.positive_tiles, tiles)
        return np.concatenate((items, slots)), np.concatenate((labels, tile_labels))


def find_tiles(
    annotations: Annotations, size: int, overlap: float
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Tile every image with a side longer than ``size``.

    Returns:
        the image of each tile (T,), its window (T, 4) xyxy in pixels of the image, and the tile and label of each box
        that is visible in a tile (without crowds), (K,) each.
    """
    a = annotations
    shapes, shape_of_image = np.unique(a.sizes, axis=0, return_inverse=True)
    shape_of_image = shape_of_image.reshape(-1)  # (N, 1) in NumPy 2.0
    images_by_shape = np.argsort(shape_of_image, kind="stable")
    bounds = np.searchsorted(shape_of_image[images_by_shape], np.arange(len(shapes) + 1))
    image_of_box = np.repeat(np.arange(len(a)), np.diff(a.offsets))
    trained = np.flatnonzero(~a.crowd)
    boxes_by_shape = trained[np.argsort(shape_of_image[image_of_box[trained]], kind="stable")]
    box_bounds = np.searchsorted(shape_of_image[image_of_box[boxes_by_shape]], np.arange(len(shapes) + 1))

    images, windows = [np.zeros(0, np.int64)], [np.zeros((0, 4), np.int64)]
    tiles, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    first = 0
    for k, (height, width) in enumerate(shapes.tolist()):
        if max(height, width) <= size:
            continue
        grid = image_windows((height, width), size, overlap)
        members = images_by_shape[bounds[k] : bounds[k + 1]]  # ascending
        images.append(np.repeat(members, len(grid)))
        windows.append(np.tile(grid, (len(members), 1)))
        rows = boxes_by_shape[box_bounds[k] : box_bounds[k + 1]]
        for chunk in np.array_split(rows, -(-len(rows) * len(grid) // MAX_PAIRS) or 1):
            row, tile = np.nonzero(_visible_pairs(a.boxes[chunk], grid))
            member = np.searchsorted(members, image_of_box[chunk[row]])
            tiles.append(first + member * len(grid) + tile)
            labels.append(a.labels[chunk[row]])
        first += len(members) * len(grid)
    return np.concatenate(images), np.concatenate(windows), (np.concatenate(tiles), np.concatenate(labels))


def _visible_pairs(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Return which of (N, 4) boxes are sufficiently visible in which of (T, 4) windows, (N, T) bool."""
    pairs = np.repeat(boxes, len(windows), axis=0)
    window_of_pair = np.tile(windows, (len(boxes), 1))
    return clip_boxes(pairs, window_of_pair)[1].reshape(len(boxes), len(windows))
