"""The batch that fits into a GPU's memory."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from detkit.distributed.collectives import single_rank
from detkit.engine.precision import Precision, is_out_of_memory
from detkit.errors import DetkitError
from detkit.models.detector import Detector
from detkit.models.profiling import dummy_batch
from detkit.ops.memory import free_memory, gib

COPIES_TRAINED = 4  # of the weights, at least, in a training: with the gradients, the average and the optimizer's
BYTES = 15  # that a pixel of a batch takes before the network sees it: three of one byte, and as floats
LARGEST = 1024  # images of a batch that are ever tried
BOXES = 100  # of an image in a trial: a crowded mosaic
COPIES = 3  # of the weights, beside the model and its gradient: the average and two of the optimizer


def check_batch(batch_size: int, image_size: int, device: torch.device) -> None:
    """Check that a batch of pictures fits into the memory of the CPU, if that is what computes.

    This is a lower bound: what the network itself takes depends on it.

    Raises:
        DetkitError: it does not.
    """
    if device.type != "cpu":
        return
    size, free = batch_size * image_size**2 * BYTES, free_memory()
    if size > free:
        raise DetkitError(
            f"batch_size={batch_size} images of {image_size}x{image_size} pixels take {gib(size)} before the network "
            f"sees them, more than the {gib(free)} of free memory: lower batch_size or image_size"
        )


def largest_batch(attempt: Callable[[int], object], most: int = LARGEST) -> int:
    """Return the largest batch of 1, 2, 4, ... ``most`` images for which ``attempt`` does not run out of GPU memory.

    Returns:
        0 where one image is too much.
    """
    fits, size = 0, 1
    while size <= most:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            full = True  # the error holds the tensors of its frames: they go when this block has ended
        else:
            full = False
        torch.cuda.empty_cache()  # does nothing without CUDA
        if full:
            break
        fits, size = size, 2 * size
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # a run's memory is not that of its trials
    return fits


def make_trial_step(
    detector: Detector, loss: nn.Module, precision: Precision, image_size: int
) -> Callable[[int], None]:
    """Return a function that runs one forward and backward pass of noise, with as many copies of the weights in memory
    as training has; the detector stays as it is.

    Args:
        image_size: side in pixels, the largest of a training with ``trainer.multi_scale``.
    """

    def attempt(images: int) -> None:
        copies = [copy.deepcopy(detector) for _ in range(COPIES)]
        model = copies[0].train()
        classes = len(detector.class_names)
        batch = dummy_batch(images, (image_size, image_size), BOXES, classes).to(precision.device)
        with single_rank():  # the other ranks do not take part
            with precision.autocast():
                out = model(batch.images.contiguous(memory_format=torch.channels_last).float() / 255)
            sum(loss(out, batch).values()).backward()

    return attempt


def choose_batch_size(attempt: Callable[[int], object], device: torch.device) -> int:
    """Return what ``batch_size=auto`` stands for: the largest power of two that fits.

    Raises:
        DetkitError: the device has no memory of its own, or too little for one image.
    """
    if device.type != "cuda":
        raise DetkitError(f"batch_size=auto fits a GPU's memory, the device is {device}: give it a number, such as 16")
    size = largest_batch(attempt)
    if not size:
        raise DetkitError(f"not one image fits into the memory of {device}: lower image_size, or take a smaller model")
    return size


def explain_out_of_memory(attempt: Callable[[int], object], batch_size: int, device: torch.device) -> str:
    """Return the sentence for a training that ran out of memory, with a batch that would fit."""
    size = largest_batch(attempt, most=batch_size // 2)
    advice = f"batch_size={size} would fit" if size else "lower image_size, or take a smaller model"
    return f"batch_size={batch_size} is too much for the memory of {device}: {advice}"
