"""torch.compile for the network, with a fallback to eager mode."""

import logging

import torch
from torch import Tensor, nn

from detkit.distributed.process_group import all_reduce_max
from detkit.distributed.sync_batch_norm import SyncBatchNorm
from detkit.engine.nonfinite import BatchNormSnapshot
from detkit.engine.param_groups import train_mode
from detkit.models.detector import Detector
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision

logger = logging.getLogger(__name__)


def compile_network(
    detector: Detector,
    precision: Precision,
    image_size: int,
    batch_size: int,
    *,
    dynamic: bool = False,
) -> nn.Module:
    """Return the detector with compiled forward and backward passes and the same parameters.

    It is tried on a batch of noise, which takes a minute or more. If that fails on any rank, the detector itself is
    returned on every rank. Batches of another shape, such as the last of an epoch, run uncompiled.

    Args:
        detector: model, on its device.
        precision: of the forward pass.
        image_size: side of the images in pixels.
        batch_size: images per batch on this rank.
        dynamic: compile for images of any size.
    """
    reason = ""
    if any(isinstance(module, SyncBatchNorm) for module in detector.modules()):
        reason = "trainer.sync_bn=true waits for other ranks within the network"
    network = torch.compile(detector, dynamic=dynamic or None)
    assert isinstance(network, nn.Module)  # as the detector is; the stubs only promise a callable
    torch.compiler.set_stance("default")
    torch._dynamo.reset()  # graphs of earlier jobs in a sweep count towards the recompile limit
    if not reason:
        logger.info("compiling the network: this takes minutes")
    try:
        if not reason:
            _try(network, detector, precision, image_size, batch_size)
    except Exception as error:  # from Dynamo, Inductor, or a missing C++ compiler
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if all_reduce_max(int(bool(reason))):
        reason = reason or "compiling failed on another rank"
        logger.warning("trainer.compile: the network runs uncompiled (%s)", reason)
        return detector
    torch.compiler.set_stance("eager_on_recompile")
    return network


def _try(network: nn.Module, detector: Detector, precision: Precision, image_size: int, batch_size: int) -> None:
    """Run one forward and backward pass on noise, as in training, leaving only the compiled code behind."""
    train_mode(detector)
    statistics = BatchNormSnapshot(detector)
    before = statistics.copy()
    try:
        with torch.random.fork_rng([precision.device] if precision.device.type == "cuda" else []):
            images = dummy_batch(batch_size, (image_size, image_size), 1, 1).to(precision.device).images
            images = images.contiguous(memory_format=torch.channels_last).float() / 255
            with precision.autocast():
                out = network(images)
            outputs = [value for value in vars(out).values() if isinstance(value, Tensor) and value.requires_grad]
            torch.stack([value.float().mean() for value in outputs]).sum().backward()
    finally:
        detector.zero_grad()
        statistics.keep_finite(before, torch.zeros((), dtype=torch.bool, device=precision.device))
