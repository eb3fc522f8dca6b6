"""The detector (backbone, neck and head), and building it from a config."""

import copy
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import detkit.layers  # noqa: F401  (registers the blocks)
from detkit.errors import DetkitError, shorten
from detkit.models import backbones, heads, losses, necks  # noqa: F401  (register themselves)
from detkit.models.budget import build_on_meta
from detkit.ops.image import IMAGE_SUFFIXES, Letterbox, is_image, read_image
from detkit.ops.nms import non_max_suppression
from detkit.registry import BACKBONES, HEADS, LOSSES, NECKS
from detkit.structures import DenseOutput, Detections

Source = str | Path | np.ndarray | Sequence["Source"]


class Detector(nn.Module):
    """A backbone, a neck and a head in sequence.

    Attributes:
        class_names: one name per class, in the order of the class logits.
        cfg: resolved configuration it was built from, as plain dicts and lists.
        max_stride: both sides of an input must be divisible by it.
        is_fused: whether this is the result of ``fuse()``.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: nn.Module, class_names: Sequence[str], cfg: Mapping[str, Any]
    ) -> None:
        super().__init__()
        # Parts are duck-typed (strides, out_channels, ...); there is no base class.
        self.backbone = cast("Any", backbone)
        self.neck = cast("Any", neck)
        self.head = cast("Any", head)
        self.class_names = tuple(class_names)
        self.cfg = dict(cfg)
        self.max_stride = max(*self.backbone.strides, *self.head.strides)
        self.is_fused = False

    def forward(self, images: Tensor) -> DenseOutput:
        """Map images (B, 3, H, W), float RGB in 0..1, to a DenseOutput.

        Raises:
            DetkitError: H or W is not divisible by the largest stride.
        """
        height, width = images.shape[-2:]
        if height % self.max_stride or width % self.max_stride:
            raise DetkitError(
                f"input is {height}x{width} pixels: both sides must be divisible by {self.max_stride}; resize or pad it"
            )
        return self.head(self.neck(self.backbone(images)))

    def decode(self, out: DenseOutput) -> tuple[Tensor, Tensor]:
        """Return boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1."""
        return self.head.decode(out)

    @torch.inference_mode()
    def predict(
        self,
        source: Source,
        score: float = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        image_size: int | None = None,
        multi_label: bool = False,
    ) -> list[Detections]:
        """Detect objects in images, one image at a time, each letterboxed to a square.

        Args:
            source: a file, a folder (its images by name), an (H, W, 3) uint8 RGB array, or a list of these.
            score: minimum score (exclusive).
            iou: suppress a box if its IoU with a higher-scoring box of its class exceeds this.
            max_det: maximum number of objects per image.
            image_size: side of the square in pixels; by default the one used in training.
            multi_label: report a box once for each of its classes above ``score``, instead of for its best class only.

        Returns:
            One Detections per image, with boxes in pixels of that image.

        Raises:
            DetkitError: the source or a value is invalid.
            UnreadableImage: a file is not a readable image.
        """
        for name, value in (("score", score), ("iou", iou)):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise DetkitError(f"{name}={shorten(value)} must be a number from 0 to 1")
        if not isinstance(max_det, int) or max_det < 1:
            raise DetkitError(f"max_det={shorten(max_det)} must be a whole number, 1 or more")
        thresholds = {"score": score, "iou": iou, "max_det": max_det, "multi_label": multi_label}
        size = image_size or self.cfg.get("image_size", 640)
        was_training = self.training
        self.eval()
        try:
            return [self._predict_one(path, image, size, thresholds) for path, image in _iter_images(source)]
        finally:
            self.train(was_training)

    def _predict_one(
        self, path: Path | None, image: np.ndarray, size: int, thresholds: Mapping[str, Any]
    ) -> Detections:
        parameter = next(self.parameters())
        height, width = image.shape[:2]
        box = Letterbox.fit((height, width), (size, size))
        pixels = torch.from_numpy(box.apply(image)).to(parameter.device).permute(2, 0, 1)[None]
        boxes, scores = self.decode(self(pixels.to(parameter.dtype) / 255))
        ((xyxy, confidence, labels),) = non_max_suppression(boxes, scores, **thresholds)
        xyxy = unletterbox(xyxy, box.scale, box.offset, (height, width))
        return Detections(xyxy.cpu(), confidence.cpu(), labels.cpu(), self.class_names, (height, width), path)

    def fuse(self) -> "Detector":
        """Return a frozen copy in deployed form (batch norms folded, branches merged) with equal outputs.

        A detector that is already fused is returned as it is.
        """
        if self.is_fused:
            return self
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        fused.is_fused = True
        for module in list(fused.modules()):
            if module is not fused and callable(fuse := getattr(module, "fuse", None)):
                fuse()
        return fused.to(memory_format=torch.channels_last)


def unletterbox(xyxy: Tensor, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Map boxes (N, 4) from a letterboxed frame to pixels of the source image of ``size`` (h, w), clipped to it."""
    height, width = size
    xyxy = (xyxy - xyxy.new_tensor((*offset, *offset))) / xyxy.new_tensor((*scale, *scale))
    limit = xyxy.new_tensor((width, height, width, height))
    return torch.minimum(xyxy.clamp(min=0), limit)


def build_detector(cfg: Mapping[str, Any], class_names: Sequence[str], copies: int = 1) -> Detector:
    """Build a detector from ``cfg["backbone"]``, ``cfg["neck"]`` and ``cfg["head"]``, channels-last in memory.

    Each is ``{name, keyword arguments}``; channels, strides and the number of classes are derived here.

    Args:
        cfg: the resolved configuration.
        class_names: one name per class.
        copies: how many copies of the weights will be in memory.

    Raises:
        DetkitError: a name or keyword is unknown, the parts do not fit together, or the weights would not fit into
            the free memory (checked before allocating any).
    """
    if torch.get_default_device().type != "meta":
        build_meta_detector(cfg, class_names, copies)
    return _compose(cfg, class_names)


def build_meta_detector(cfg: Mapping[str, Any], class_names: Sequence[str], copies: int = 1) -> Detector | None:
    """Build a detector on the meta device; None if that is not possible, see ``budget.build_on_meta``."""
    return build_on_meta(lambda: _compose(without_pretrained(cfg), class_names), copies)


def without_pretrained(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the config with pretrained backbone weights disabled."""
    without = {"pretrained": False, "weights": None}
    return {**cfg, "backbone": {key: without.get(key, value) for key, value in cfg["backbone"].items()}}


def _compose(cfg: Mapping[str, Any], class_names: Sequence[str]) -> Detector:
    neck_spec = dict(cfg["neck"])
    in_strides = neck_spec.pop("in_strides", None)
    if in_strides is None:
        in_strides = getattr(NECKS.get(neck_spec.get("name", "")), "in_strides", None)
    if not in_strides:
        raise DetkitError(
            f"neck '{neck_spec['name']}' must declare in_strides, the strides of its inputs, such as (8, 16, 32)"
        )
    backbone = BACKBONES.build(cfg["backbone"], out_strides=tuple(in_strides))
    _check_declaration(backbone, f"backbone '{cfg['backbone']['name']}'")
    if tuple(backbone.strides) != tuple(in_strides):
        raise DetkitError(
            f"backbone '{cfg['backbone']['name']}' has features at strides {list(backbone.strides)}, "
            f"neck '{neck_spec['name']}' takes {list(in_strides)}: choose another backbone or neck"
        )
    neck = NECKS.build(neck_spec, in_channels=backbone.out_channels, strides=backbone.strides)
    _check_declaration(neck, f"neck '{neck_spec['name']}'")
    head = HEADS.build(cfg["head"], in_channels=neck.out_channels, strides=neck.strides, num_classes=len(class_names))
    head.init_bias()
    return Detector(backbone, neck, head, class_names, cfg).to(memory_format=torch.channels_last)


def _check_declaration(part: nn.Module, name: str) -> None:
    """Check that a backbone or neck declares the channels and strides of its outputs."""
    channels, strides = getattr(part, "out_channels", None), getattr(part, "strides", None)
    if not isinstance(channels, Sequence) or not isinstance(strides, Sequence) or len(channels) != len(strides):
        raise DetkitError(
            f"{name} must declare out_channels and strides, one of each per feature map: "
            f"it has out_channels {channels} and strides {strides}"
        )


def build_loss(cfg: Mapping[str, Any], head: nn.Module) -> nn.Module:
    """Build ``cfg["loss"]`` for a head.

    Raises:
        DetkitError: a name or keyword is unknown, or the loss takes another kind of output than the head returns.
    """
    loss = LOSSES.build(cfg["loss"])
    returned, expected = (getattr(part, "output", DenseOutput) for part in (head, loss))
    if returned is not expected:
        raise DetkitError(
            f"loss '{cfg['loss']['name']}' takes {expected.__name__}, head '{cfg['head']['name']}' returns "
            f"{returned.__name__}: omit loss= to use the head's own"
        )
    return loss


def expand_source(path: Path) -> list[Path]:
    """Return the images of a folder sorted by name, or the single file.

    Raises:
        DetkitError: the path does not exist or cannot be read, or the folder contains no images.
    """
    try:
        mode = path.stat().st_mode
        listed = path.iterdir() if stat.S_ISDIR(mode) else ()
        files = sorted(file for file in listed if is_image(file.name))
    except FileNotFoundError:
        raise DetkitError(f"source {shorten(str(path))} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, a symlink loop, a NUL character
        reason = getattr(error, "strerror", None) or error
        raise DetkitError(f"cannot read source {shorten(str(path))}: {reason}") from None
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise DetkitError(f"source {shorten(str(path))} is neither a regular file nor a folder")
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DetkitError(f"folder {shorten(str(path))} contains no images (looked for {suffixes})")
    return files


def _iter_images(source: Source) -> Iterator[tuple[Path | None, np.ndarray]]:
    """Yield (path, (H, W, 3) uint8 RGB image) for every image in ``source``, reading one at a time."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise DetkitError(f"an image array must be (H, W, 3) uint8 RGB, not {source.shape} {source.dtype}")
        yield None, source
    elif isinstance(source, (str, Path)):
        for file in expand_source(Path(source)):
            yield file, read_image(file)
    elif not isinstance(source, Sequence):
        raise DetkitError(
            f"a source must be a file, a folder, an image array or a list of these, not {type(source).__name__}"
        )
    else:
        for item in source:
            yield from _iter_images(item)
