"""Batch sizes that fit into memory."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from detkit.distributed.collectives import single_rank
from detkit.errors import DetkitError
from detkit.models.detector import Detector
from detkit.models.profiling import dummy_batch
from detkit.ops.memory import free_memory, gib
from detkit.ops.precision import Precision, is_out_of_memory

COPIES_TRAINED = 4  # copies of the weights in training, at least: weights, gradients, EMA, optimizer state
BYTES_PER_PIXEL = 15  # of a batch before the forward pass: three uint8 channels, and the same as float32
MAX_BATCH_SIZE = 1024
TRIAL_BOXES = 100  # boxes per image in a trial: a crowded mosaic
EXTRA_COPIES = 3  # copies of the weights besides the model and its gradients: EMA and two optimizer states


def check_batch(batch_size: int, image_size: int, device: torch.device) -> None:
    """Check that a batch of images fits into the CPU's memory, if the model runs on the CPU.

    This is a lower bound: the memory of the network itself is not included.

    Raises:
        DetkitError: the batch does not fit.
    """
    if device.type != "cpu":
        return
    size, free = batch_size * image_size**2 * BYTES_PER_PIXEL, free_memory()
    if size > free:
        raise DetkitError(
            f"batch_size={batch_size} images of {image_size}x{image_size} pixels take {gib(size)} before the forward "
            f"pass, more than the {gib(free)} of free memory: lower batch_size or image_size"
        )


def largest_batch(attempt: Callable[[int], object], limit: int = MAX_BATCH_SIZE) -> int:
    """Return the largest of the batch sizes 1, 2, 4, ..., ``limit`` for which ``attempt`` fits into the GPU's memory.

    Returns:
        the batch size; 0 if a single image does not fit.
    """
    fits, size = 0, 1
    while size <= limit:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            full = True  # the error's traceback keeps tensors alive until this block ends
        else:
            full = False
        torch.cuda.empty_cache()  # does nothing without CUDA
        if full:
            break
        fits, size = size, 2 * size
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # trials do not count towards the run's peak memory
    return fits


def make_trial_step(
    detector: Detector, loss: nn.Module, precision: Precision, image_size: int
) -> Callable[[int], None]:
    """Return a function that runs one forward and backward pass on noise, given a batch size.

    It keeps as many copies of the weights in memory as training does. The detector is not changed.

    Args:
        detector: model, on its device.
        loss: (DenseOutput, Batch) -> weighted terms.
        precision: of the forward pass, with the device.
        image_size: side in pixels; with ``trainer.multi_scale``, the largest one.
    """

    def attempt(images: int) -> None:
        copies = [copy.deepcopy(detector) for _ in range(EXTRA_COPIES)]
        model = copies[0].train()
        classes = len(detector.class_names)
        batch = dummy_batch(images, (image_size, image_size), TRIAL_BOXES, classes).to(precision.device)
        with single_rank():  # the other ranks do not take part
            with precision.autocast():
                out = model(batch.images.contiguous(memory_format=torch.channels_last).float() / 255)
            sum(loss(out, batch).values()).backward()

    return attempt


def choose_batch_size(attempt: Callable[[int], object], device: torch.device) -> int:
    """Return the batch size for ``batch_size=auto``: the largest power of two that fits.

    Raises:
        DetkitError: the device is not a GPU, or has too little memory for one image.
    """
    if device.type != "cuda":
        raise DetkitError(f"batch_size=auto needs a GPU, but the device is {device}: set a number, such as 16")
    size = largest_batch(attempt)
    if not size:
        raise DetkitError(
            f"not even one image fits into the memory of {device}: lower image_size, or use a smaller model"
        )
    return size


def explain_out_of_memory(attempt: Callable[[int], object], batch_size: int, device: torch.device) -> str:
    """Return the error message for a run that ran out of memory, with a batch size that would fit."""
    size = largest_batch(attempt, limit=batch_size // 2)
    advice = f"batch_size={size} would fit" if size else "lower image_size, or use a smaller model"
    return f"batch_size={batch_size} does not fit into the memory of {device}: {advice}"
