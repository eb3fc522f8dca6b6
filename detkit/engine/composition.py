"""What must hold for a detector whatever it is made of: one function a property, and one a figure.

A check returns a few words about what it saw, and raises ``Failure`` with a few words about what differed.
``detkit check`` prints them all; the tests run them over the composition grid.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detkit.engine.measure import counted_flops, random_batch, saved_bytes
from detkit.engine.precision import Precision
from detkit.models.detector import Detector
from detkit.structures import Batch

FUSED_TOLERANCE = 1e-3  # deviation of boxes and of scores: the norm of the difference as a share of the norm
COPY_TOLERANCE = 1e-6
HALF_TOLERANCE = 8  # times the deviation that rounding the weights causes, which is between 1 and 3 times as a rule
REVERSED_TOLERANCE = 1e-6  # deviation of each parameter's gradient, in float64


class Failure(Exception):
    """A property does not hold; says in a few words what differed."""


class DoesNotApply(Exception):  # noqa: N818  (no error)
    """There is nothing of the kind in this detector."""


@dataclass(frozen=True)
class Composition:
    """A detector and what it learns from.

    Attributes:
        detector: on the device to be checked.
        loss: (DenseOutput, Batch) -> weighted terms.
        image_size: side in pixels for the figures; the checks take smaller images.
    """

    detector: Detector
    loss: nn.Module
    image_size: int = 640

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.detector.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images to check with: not square, 64x96 where the largest stride is 32."""
        return 2 * self.detector.max_stride, 3 * self.detector.max_stride

    def images(self, count: int) -> Tensor:
        """Return noise (count, 3, H, W) in 0..1."""
        return torch.rand(count, 3, *self.size, device=self.device)

    def batch(self, images: int, boxes: int) -> Batch:
        """Return noise images with random boxes."""
        return random_batch(images, self.size, boxes, len(self.detector.class_names)).to(self.device)

    def decode(self) -> tuple[Tensor, Tensor]:
        """Return the boxes and scores of two images that are always the same, in eval mode."""
        return _decode(self.detector, self.same_images())

    def same_images(self) -> Tensor:
        """Return two images of noise, the same at every call."""
        noise = torch.rand(2, 3, *self.size, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device)


@torch.no_grad()
def awaken(composition: Composition) -> None:
    """Let every part of a fresh detector show in its outputs, so that comparing outputs compares all of it.

    Scales that start at (nearly) 0 hide the branch behind them, and a batch norm that has seen nothing is the
    identity: the first get values, the second weights and the statistics of a batch of noise.
    """
    detector = composition.detector
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
    for parameter in detector.parameters():
        if parameter.requires_grad and parameter.abs().max() < 1e-3:
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5)
            else:
                parameter.uniform_(0.1, 0.3)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        detector.train()(composition.images(4))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


# Checks ---------------------------------------------------------------------------------------------------------


def output_shapes(composition: Composition) -> str:
    """Square images: features match the declared channels and strides, as many boxes as scores, inputs untouched."""
    side = composition.size[0]
    _check_shapes(composition, side, side)
    strides = ", ".join(map(str, composition.detector.head.strides))
    return f"as declared; strides {strides}"


def non_square_input(composition: Composition) -> str:
    """The same, lying and standing."""
    height, width = composition.size
    _check_shapes(composition, height, width)
    _check_shapes(composition, width, height)
    return f"{height}x{width} and {width}x{height}"


def batch_of_one(composition: Composition) -> str:
    """A single image trains."""
    _backward(composition, composition.batch(images=1, boxes=4))
    return "trains"


def unused_parameters(composition: Composition) -> str:
    """Every parameter that learns gets a finite gradient from the loss."""
    _backward(composition, composition.batch(images=2, boxes=4))
    learning = sum(p.requires_grad for p in composition.detector.parameters())
    return f"all {learning} tensors that learn get a gradient"


def empty_targets(composition: Composition) -> str:
    """Images without boxes give a finite loss and gradients, alone and beside images with boxes."""
    _backward(composition, composition.batch(images=2, boxes=0))
    padded = composition.batch(images=2, boxes=3)
    padded.valid_bm[0] = False
    _backward(composition, padded)
    padded.valid_bm[:] = False
    return f"loss {_backward(composition, padded):.3g} without a box"


def half_precision(composition: Composition) -> str:
    """Under autocast (bf16 on a CPU, what ``amp=auto`` picks on a GPU) it trains, and decodes nearly the same.

    How far half precision deviates depends on how much the network magnifies rounding errors, so the measure is what
    the same detector in float32 deviates by when only its weights are rounded to half precision.
    """
    precision = Precision.pick("bf16" if composition.device.type == "cpu" else "auto", composition.device)
    expected = composition.decode()
    with precision.autocast():
        found = composition.decode()
    rounded = copy.deepcopy(composition.detector)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(precision.dtype))
    unavoidable = _deviations(_decode(rounded, composition.same_images()), expected)
    for name, deviation, unit in zip(("boxes", "scores"), _deviations(found, expected), unavoidable, strict=True):
        if deviation > HALF_TOLERANCE * max(unit, 0.01):
            raise Failure(f"{name} of {precision} deviate by {deviation:.1%}, from rounding the weights by {unit:.1%}")
    _backward(composition, composition.batch(images=2, boxes=4), precision)
    return f"{precision}: boxes deviate by {_deviations(found, expected)[0]:.1%}, from rounding the weights by {unavoidable[0]:.1%}"


def deep_copy(composition: Composition) -> str:
    """A copy says the same, and what is done to it does not reach the original."""
    detector = composition.detector
    expected = composition.decode()
    twin = Composition(copy.deepcopy(detector), composition.loss)
    deviation = max(_deviations(twin.decode(), expected))
    if deviation > COPY_TOLERANCE:
        raise Failure(f"the copy's outputs deviate by {deviation:.2g}")
    detector.zero_grad()
    _backward(twin, twin.batch(images=2, boxes=4))
    reached = [name for name, p in detector.named_parameters() if p.grad is not None]
    if reached:
        raise Failure(f"training the copy gives the original gradients: {_some(reached)}")
    with torch.no_grad():
        for tensor in (*twin.detector.parameters(), *twin.detector.buffers()):
            tensor.zero_()
    if max(_deviations(composition.decode(), expected)) > COPY_TOLERANCE:
        raise Failure("changing the copy changes the original")
    return "equal and independent"


def reversible_gradients(composition: Composition) -> str:
    """Parts with ``save_memory`` give the same gradients with it as without it, in float64."""
    twin = copy.deepcopy(composition.detector).double().train()
    parts = [module for module in twin.modules() if hasattr(module, "save_memory")]
    if not parts:
        raise DoesNotApply("nothing recomputes in backward")
    images = composition.images(2).double()
    found, expected = _plain_gradients(twin, parts, images, True), _plain_gradients(twin, parts, images, False)
    if found.keys() != expected.keys():
        raise Failure(f"other parameters get a gradient: {_some(sorted(found.keys() ^ expected.keys()))}")
    floor = 1e-9 * max(float(gradient.norm()) for gradient in expected.values())
    errors = {n: float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= REVERSED_TOLERANCE:
        raise Failure(f"the gradient of {worst} deviates by {errors[worst]:.2g} of its norm")
    return f"deviate by {errors[worst]:.1g} in float64, tolerated is {REVERSED_TOLERANCE:g}"


def fused_outputs(composition: Composition) -> str:
    """The deployed form says the same, and making it leaves the original as it was."""
    expected = composition.decode()
    deviation = max(_deviations(_decode(composition.detector.fuse(), composition.same_images()), expected))
    if deviation > FUSED_TOLERANCE:
        raise Failure(f"fused outputs deviate by {deviation:.2%}, tolerated is {FUSED_TOLERANCE:.1%}")
    if max(_deviations(composition.decode(), expected)) > COPY_TOLERANCE:
        raise Failure("fusing changes the original")
    return f"deviate by {deviation:.1g}, tolerated is {FUSED_TOLERANCE:g}"


# Figures --------------------------------------------------------------------------------------------------------


def parameter_count(composition: Composition) -> str:
    """Parameters, and those of the deployed form."""
    plain, fused = (
        sum(p.numel() for p in module.parameters()) for module in (composition.detector, composition.detector.fuse())
    )
    return f"{plain:,}; fused {fused:,}"


def operator_counted_gflops(composition: Composition) -> str:
    """Operations of one image in eval mode, a multiply-add counting 2."""
    image = torch.zeros(1, 3, composition.image_size, composition.image_size, device=composition.device)
    return f"{counted_flops(composition.detector.eval(), image) / 1e9:.1f} at {composition.image_size}x{composition.image_size}"


def activation_memory(composition: Composition) -> str:
    """What autograd keeps of one image for the backward pass."""
    image = torch.rand(1, 3, composition.image_size, composition.image_size, device=composition.device)
    kept = saved_bytes(composition.detector.train(), image)
    return f"{kept / 2**20:.0f} MiB an image at {composition.image_size}x{composition.image_size}"


Check = Callable[[Composition], str]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("output shapes", output_shapes),
    ("non-square input", non_square_input),
    ("batch of 1", batch_of_one),
    ("unused parameters", unused_parameters),
    ("empty targets", empty_targets),
    ("half precision", half_precision),
    ("deepcopy", deep_copy),
    ("reversible gradients", reversible_gradients),
    ("fused outputs", fused_outputs),
)
FIGURES: tuple[tuple[str, Check], ...] = (
    ("parameters", parameter_count),
    ("GFLOPs", operator_counted_gflops),
    ("activation memory", activation_memory),
)


@dataclass(frozen=True)
class Finding:
    """What came of a check: ``status`` is pass, fail, or - where there was nothing to check."""

    title: str
    status: str
    words: str


def examine(composition: Composition, title: str, check: Check) -> Finding:
    """Run one check; whatever it raises is a finding."""
    try:
        return Finding(title, "pass", check(composition))
    except Failure as failure:
        return Finding(title, "fail", str(failure))
    except DoesNotApply as reason:
        return Finding(title, "-", str(reason))
    except Exception as error:  # whatever somebody's part does when it is run
        first_line = (str(error).splitlines() or [""])[0]
        return Finding(title, "fail", f"{type(error).__name__}: {first_line}")


def _check_shapes(composition: Composition, height: int, width: int) -> None:
    """Run images of this size through the parts one by one, looking at shapes only (a meta device will do)."""
    detector = composition.detector.eval()
    maps: Tensor | tuple[Tensor, ...] = torch.rand(2, 3, height, width, device=composition.device)
    with torch.no_grad():
        for name, part in (("backbone", detector.backbone), ("neck", detector.neck)):
            features = _leaving_inputs_alone(name, part, maps)
            expected = [(2, c, height // s, width // s) for c, s in zip(part.out_channels, part.strides, strict=True)]
            found = [tuple(feature.shape) for feature in features]
            if found != expected:
                raise Failure(f"the {name} declares {_shapes(expected)} and gives {_shapes(found)}")
            maps = features
        boxes, scores = detector.decode(_leaving_inputs_alone("head", detector.head, maps))
    points, classes = scores.shape[1], len(detector.class_names)
    if boxes.shape != (2, points, 4) or scores.shape != (2, points, classes):
        raise Failure(f"decode gives boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)} for {classes} classes")


def _leaving_inputs_alone(name: str, part: nn.Module, inputs: Tensor | tuple[Tensor, ...]):
    """Return ``part(inputs)``; fails where the part writes into its inputs, which others may still want."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    versions = [tensor._version for tensor in tensors]
    outputs = part(inputs)
    if versions != [tensor._version for tensor in tensors]:
        raise Failure(f"the {name} changes its input in place")
    return outputs


def _backward(composition: Composition, batch: Batch, precision: Precision | None = None) -> float:
    """Train mode, forward, loss, backward; fails unless the loss and every gradient are there and finite."""
    detector = composition.detector.train()
    detector.zero_grad()
    with precision.autocast() if precision else contextlib.nullcontext():
        out = detector(batch.images.float() / 255)
    loss = sum(composition.loss(out, batch).values())
    if not loss.isfinite():
        raise Failure(f"the loss is {loss.item()}")
    loss.backward()
    check_gradients(detector)
    return loss.item()


def check_gradients(detector: Detector) -> None:
    """Raise Failure unless every parameter that learns has a finite gradient."""
    learning = [(name, p.grad) for name, p in detector.named_parameters() if p.requires_grad]
    for words, names in (
        ("no gradient", [name for name, grad in learning if grad is None]),
        (
            "the gradient is not finite",
            [name for name, grad in learning if grad is not None and not grad.isfinite().all()],
        ),
    ):
        if names:
            raise Failure(f"{words}: {_some(names)}")


def _plain_gradients(
    detector: Detector, parts: list[nn.Module], images: Tensor, save_memory: bool
) -> dict[str, Tensor]:
    """Return every parameter's gradient of the mean square of the outputs, with the same random numbers each time."""
    for part in parts:
        part.save_memory = save_memory
    detector.zero_grad()
    torch.manual_seed(0)
    out = detector(images)
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def _decode(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return detector.decode(detector.eval()(images))


def _deviations(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return how far boxes and scores are from the expected ones: norm of the difference as a share of the norm."""
    for name, tensor in zip(("boxes", "scores") * 2, (*found, *expected), strict=True):
        if not tensor.isfinite().all():
            raise Failure(f"{name} are not finite")
    boxes, scores = (float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))
    return boxes, scores


def _some(names: list[str]) -> str:
    """Return the first two names, and how many more there are."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
