"""Checks for any detector, one function per property, and its size and cost.

A check returns a short message, or raises PropertyError with a message about what differed, or DoesNotApply.
``detkit check`` prints all messages; the tests run the checks over a grid of compositions.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.checks.harness import Composition, PropertyError, abbreviate, deviations
from detkit.models.detector import Detector
from detkit.models.profiling import activation_bytes, count_flops
from detkit.ops.precision import Precision

FUSED_TOLERANCE = 1e-3  # deviation of boxes and scores (harness.deviations)
COPY_TOLERANCE = 1e-6
HALF_TOLERANCE = 8  # times the deviation caused by rounding the weights; usual is 1 to 4 times
REVERSED_TOLERANCE = 1e-6  # deviation of each parameter's gradient, in float64

Check = Callable[[Composition], str]


class DoesNotApply(Exception):  # noqa: N818  (not an error)
    """The check does not apply to this detector."""


@dataclass(frozen=True)
class CheckResult:
    """Result of a check; ``status`` is pass, fail, or - if the check does not apply."""

    title: str
    status: str
    message: str


def run_check(composition: Composition, title: str, check: Check) -> CheckResult:
    """Run one check; any exception makes it fail."""
    try:
        return CheckResult(title, "pass", check(composition))
    except PropertyError as error:
        return CheckResult(title, "fail", str(error))
    except DoesNotApply as reason:
        return CheckResult(title, "-", str(reason))
    except Exception as error:  # parts may raise anything
        first_line = (str(error).splitlines() or [""])[0]
        return CheckResult(title, "fail", f"{type(error).__name__}: {first_line}")


def output_shapes(composition: Composition) -> str:
    """Check on square images that shapes match the declarations and inputs are not modified."""
    side = composition.size[0]
    _check_shapes(composition, side, side)
    head: Any = composition.detector.head
    return f"as declared; strides {', '.join(map(str, head.strides))}"


def non_square_input(composition: Composition) -> str:
    """Do the same as ``output_shapes`` for portrait and landscape images."""
    height, width = composition.size
    _check_shapes(composition, height, width)
    _check_shapes(composition, width, height)
    return f"{height}x{width} and {width}x{height}"


def batch_of_one(composition: Composition) -> str:
    """Check that a batch of one image can be trained on."""
    composition.backward(composition.batch(images=1, boxes=4))
    return "trains"


def unused_parameters(composition: Composition) -> str:
    """Check that every trainable parameter gets a finite gradient from the loss."""
    composition.backward(composition.batch(images=2, boxes=4))
    unused = composition.without_gradient()
    if unused:
        raise PropertyError(f"no gradient reaches {abbreviate(unused)}")
    return f"all {sum(p.requires_grad for p in composition.detector.parameters())} trainable tensors get a gradient"


def empty_targets(composition: Composition) -> str:
    """Check that images without boxes give a finite loss, and gradients to the same parameters as with boxes."""
    composition.backward(composition.batch(images=2, boxes=3))
    unused = set(composition.without_gradient())
    padded = composition.batch(images=2, boxes=3)
    padded.valid_bm[:] = False
    for batch in (composition.batch(images=2, boxes=0), padded):
        loss = composition.backward(batch)
        more = sorted(set(composition.without_gradient()) - unused)
        if more:
            raise PropertyError(f"without boxes no gradient reaches {abbreviate(more)}")
    return f"loss {loss:.3g} without a box"


def half_precision(composition: Composition) -> str:
    """Check that it trains and gives similar outputs under autocast (bf16 on a CPU, that of ``amp=auto`` on a GPU).

    Since networks magnify rounding errors to a different degree, the deviation is compared to that of the same detector
    in float32 with its weights rounded to half precision.
    """
    precision = Precision.from_config("bf16" if composition.device.type == "cpu" else "auto", composition.device)
    expected = composition.decode()
    with precision.autocast():
        found = deviations(composition.decode(), expected)
    rounded = copy.deepcopy(composition.detector)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(precision.dtype))
    unavoidable = deviations(composition.decode(rounded), expected)
    for name, deviation, unit in zip(("boxes", "scores"), found, unavoidable, strict=True):
        if deviation > HALF_TOLERANCE * max(unit, 0.01):
            raise PropertyError(f"{precision} {name} deviate by {deviation:.1%}, by {unit:.1%} from rounded weights")
    composition.backward(composition.batch(images=2, boxes=4), precision)
    return f"{precision} boxes deviate by {found[0]:.1%}, by {unavoidable[0]:.1%} from rounded weights"


def deep_copy(composition: Composition) -> str:
    """Check that a copy gives the same outputs and is independent of the original."""
    detector = composition.detector
    expected = composition.decode()
    clone = Composition(copy.deepcopy(detector), composition.loss)
    deviation = max(deviations(clone.decode(), expected))
    if deviation > COPY_TOLERANCE:
        raise PropertyError(f"the copy's outputs deviate by {deviation:.2g}")
    detector.zero_grad()
    clone.backward(clone.batch(images=2, boxes=4))
    reached = [name for name, parameter in detector.named_parameters() if parameter.grad is not None]
    if reached:
        raise PropertyError(f"training the copy gives the original gradients: {abbreviate(reached)}")
    with torch.no_grad():
        for tensor in (*clone.detector.parameters(), *clone.detector.buffers()):
            tensor.zero_()
    if max(deviations(composition.decode(), expected)) > COPY_TOLERANCE:
        raise PropertyError("changing the copy changes the original")
    return "equal and independent"


def reversible_gradients(composition: Composition) -> str:
    """Check that parts with ``save_memory`` give the same gradients with and without it, in float64."""
    clone = copy.deepcopy(composition.detector).double().train()
    parts = [module for module in clone.modules() if hasattr(module, "save_memory")]
    if not parts:
        raise DoesNotApply("nothing recomputes in backward")
    images = torch.rand(2, 3, *composition.size, device=composition.device, dtype=torch.float64)
    found, expected = (_gradients(clone, parts, images, save_memory) for save_memory in (True, False))
    if found.keys() != expected.keys():
        raise PropertyError(
            f"not the same parameters get a gradient: {abbreviate(sorted(found.keys() ^ expected.keys()))}"
        )
    floor = 1e-9 * max(float(gradient.norm()) for gradient in expected.values())
    errors = {n: float((found[n] - g).norm()) / max(float(g.norm()), floor) for n, g in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= REVERSED_TOLERANCE:
        raise PropertyError(f"the gradient of {worst} deviates by {errors[worst]:.2g} of its norm")
    return f"deviate by {errors[worst]:.0e} in float64 (tolerance {REVERSED_TOLERANCE:.0e})"


def fused_outputs(composition: Composition) -> str:
    """Check that the fused copy gives the same outputs in float64, and that the original is unchanged.

    In float32 a batch norm with a very small variance magnifies rounding errors, fused or not.
    """
    detector = composition.detector.double()
    try:
        expected = composition.decode()
        deviation = max(deviations(composition.decode(detector.fuse()), expected))
        changed = max(deviations(composition.decode(), expected))
    finally:
        detector.float()
    if deviation > FUSED_TOLERANCE:
        raise PropertyError(f"deviate by {deviation:.2g} (tolerance {FUSED_TOLERANCE:.0e})")
    if changed > COPY_TOLERANCE:
        raise PropertyError("fusing changes the original")
    return f"deviate by {deviation:.0e} (tolerance {FUSED_TOLERANCE:.0e})"


def parameter_count(composition: Composition) -> str:
    """Report the number of parameters, also of the fused detector."""
    detectors = composition.detector, composition.detector.fuse()
    plain, fused = (sum(p.numel() for p in detector.parameters()) for detector in detectors)
    return f"{plain:,}; fused {fused:,}"


def gflops(composition: Composition) -> str:
    """Report the GFLOPs of one image in eval mode, counted by operator; a multiply-add is 2."""
    size = composition.image_size
    image = torch.zeros(1, 3, size, size, device=composition.device)
    return f"{count_flops(composition.detector.eval(), image) / 1e9:.1f} at {size}x{size}"


def activation_memory(composition: Composition) -> str:
    """Report the memory that autograd saves for the backward pass of one image."""
    size = composition.image_size
    image = torch.rand(1, 3, size, size, device=composition.device)
    return f"{activation_bytes(composition.detector.train(), image) / 2**20:.0f} MiB per image at {size}x{size}"


CHECKS: dict[str, Check] = {
    "output shapes": output_shapes,
    "non-square input": non_square_input,
    "batch of 1": batch_of_one,
    "unused parameters": unused_parameters,
    "empty targets": empty_targets,
    "half precision": half_precision,
    "deepcopy": deep_copy,
    "reversible gradients": reversible_gradients,
    "fused outputs": fused_outputs,
}
FIGURES: dict[str, Check] = {
    "parameters": parameter_count,
    "GFLOPs": gflops,
    "activation memory": activation_memory,
}


def _check_shapes(composition: Composition, height: int, width: int) -> None:
    """Check the output shapes of all parts for images of this size (works on the meta device).

    Raises:
        PropertyError: a shape is not as declared, or a part modifies its input.
    """
    detector = composition.detector.eval()
    parts: dict[str, Any] = {"backbone": detector.backbone, "neck": detector.neck}
    expected: list[tuple[int, ...]]
    maps: Tensor | tuple[Tensor, ...] = torch.rand(2, 3, height, width, device=composition.device)
    with torch.no_grad():
        for name, part in parts.items():
            maps = _run_part(name, part, maps)
            expected = [(2, c, height // s, width // s) for c, s in zip(part.out_channels, part.strides, strict=True)]
            found = [tuple(feature.shape) for feature in maps]
            if found != expected:
                raise PropertyError(f"the {name} declares {_shapes(expected)} but returns {_shapes(found)}")
        boxes, scores = detector.decode(_run_part("head", detector.head, maps))
    expected = [(2, scores.shape[1], 4), (2, scores.shape[1], len(detector.class_names))]
    if [boxes.shape, scores.shape] != expected:
        wrong = _shapes([boxes.shape, scores.shape])
        raise PropertyError(f"decoded boxes and scores are {wrong}, not {_shapes(expected)}")


def _run_part(name: str, part: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> Any:
    """Return ``part(inputs)``.

    Raises:
        PropertyError: the part modifies its inputs, which others may use.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    versions = [tensor._version for tensor in tensors]
    outputs = part(inputs)
    if versions != [tensor._version for tensor in tensors]:
        raise PropertyError(f"the {name} changes its input in place")
    return outputs


def _gradients(detector: Detector, parts: list[Any], images: Tensor, save_memory: bool) -> dict[str, Tensor]:
    """Return the gradient of the mean squared outputs w.r.t. each parameter, with the same random numbers each time."""
    for part in parts:
        part.save_memory = save_memory
    detector.zero_grad()
    torch.manual_seed(0)
    out = detector(images)
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


def _shapes(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
