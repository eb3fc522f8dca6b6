"""The detector: backbone, neck and head, and how they are built from a config."""

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
from detkit.models.budget import sketch
from detkit.ops.image import IMAGE_SUFFIXES, Letterbox, is_image, read_image
from detkit.ops.nms import non_max_suppression
from detkit.registry import BACKBONES, HEADS, LOSSES, NECKS
from detkit.structures import DenseOutput, Detections

Source = str | Path | np.ndarray | Sequence["Source"]


class Detector(nn.Module):
    """A backbone, a neck and a head in a row.

    Attributes:
        class_names: one name a class, in the order of the class logits.
        cfg: the resolved configuration it was built from, plain dicts and lists.
        max_stride: both sides of an input divide by it.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, head: nn.Module, class_names: Sequence[str], cfg: Mapping[str, Any]
    ) -> None:
        super().__init__()
        # A part is known by what it has, such as strides, not by a base class.
        self.backbone = cast("Any", backbone)
        self.neck = cast("Any", neck)
        self.head = cast("Any", head)
        self.class_names = tuple(class_names)
        self.cfg = dict(cfg)
        self.max_stride = max(*self.backbone.strides, *self.head.strides)

    def forward(self, images: Tensor) -> DenseOutput:
        """(B, 3, H, W) float RGB in 0..1 -> DenseOutput.

        Raises:
            DetkitError: H or W does not divide by the largest stride.
        """
        height, width = images.shape[-2:]
        if height % self.max_stride or width % self.max_stride:
            raise DetkitError(
                f"input is {height}x{width} pixels: both sides must divide by {self.max_stride}; resize or pad it"
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
        """Find objects in pictures, one after another, each letterboxed to a square.

        Args:
            source: a file, a folder (its images by name), an (H, W, 3) uint8 RGB array, or a list of these.
            score: report objects above this score.
            iou: suppress a box that overlaps a better one of its class by more than this.
            max_det: at most this many objects a picture.
            image_size: side of the square in pixels; by default the one of the training.
            multi_label: a box may be reported once for each of its classes above ``score``; by default it has its
                best class only.

        Returns:
            One Detections a picture, boxes in the picture's own pixels.

        Raises:
            DetkitError: a source or value that is not allowed.
            UnreadableImage: a file that is not a readable picture.
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
            return [self._predict_one(path, image, size, thresholds) for path, image in _pictures(source)]
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
        """Return a frozen copy in its deployed form (batch norms folded, branches merged): equal outputs."""
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(fused.modules()):
            if module is not fused and callable(fuse := getattr(module, "fuse", None)):
                fuse()
        return fused.to(memory_format=torch.channels_last)


def unletterbox(xyxy: Tensor, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Undo a letterbox: boxes (N, 4) in the frame -> pixels of the source image of ``size`` (h, w), clipped to it."""
    height, width = size
    xyxy = (xyxy - xyxy.new_tensor((*offset, *offset))) / xyxy.new_tensor((*scale, *scale))
    limit = xyxy.new_tensor((width, height, width, height))
    return torch.minimum(xyxy.clamp(min=0), limit)


def build_detector(cfg: Mapping[str, Any], class_names: Sequence[str], copies: int = 1) -> Detector:
    """Compose a detector from ``cfg["backbone"]``, ``cfg["neck"]`` and ``cfg["head"]``, channels-last in memory.

    Each is ``{name, keyword arguments}``; channels, strides and the number of classes are derived here.

    Args:
        copies: of its weights that are going to be in memory.

    Raises:
        DetkitError: an unknown name or keyword, or parts that do not fit; the sentence says which. Or there is too
            little memory, which is found out before any is taken.
    """
    if torch.get_default_device().type != "meta":
        sketch_detector(cfg, class_names, copies)
    return _compose(cfg, class_names)


def sketch_detector(cfg: Mapping[str, Any], class_names: Sequence[str], copies: int = 1) -> Detector | None:
    """Compose a detector of shapes alone; None where that is not possible, see ``budget.sketch``."""
    return sketch(lambda: _compose(without_pretrained(cfg), class_names), copies)


def without_pretrained(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose backbone is built without looking for published weights, as others are at hand."""
    without = {"pretrained": False, "weights": None}
    return {**cfg, "backbone": {key: without.get(key, value) for key, value in cfg["backbone"].items()}}


def _compose(cfg: Mapping[str, Any], class_names: Sequence[str]) -> Detector:
    neck_spec = dict(cfg["neck"])
    in_strides = neck_spec.pop("in_strides", None)
    if in_strides is None:
        in_strides = getattr(NECKS.get(neck_spec.get("name", "")), "in_strides", None)
    if not in_strides:
        raise DetkitError(f"neck '{neck_spec['name']}' must declare in_strides, such as (8, 16, 32): what it takes")
    backbone = BACKBONES.build(cfg["backbone"], out_strides=tuple(in_strides))
    _check_declaration(backbone, f"backbone '{cfg['backbone']['name']}'")
    if tuple(backbone.strides) != tuple(in_strides):
        raise DetkitError(
            f"backbone '{cfg['backbone']['name']}' gives features at strides {list(backbone.strides)}, "
            f"neck '{neck_spec['name']}' takes {list(in_strides)}: choose another of the two"
        )
    neck = NECKS.build(neck_spec, in_channels=backbone.out_channels, strides=backbone.strides)
    _check_declaration(neck, f"neck '{neck_spec['name']}'")
    head = HEADS.build(cfg["head"], in_channels=neck.out_channels, strides=neck.strides, num_classes=len(class_names))
    head.init_bias()
    return Detector(backbone, neck, head, class_names, cfg).to(memory_format=torch.channels_last)


def _check_declaration(part: nn.Module, name: str) -> None:
    """Check that a backbone or neck says what it gives."""
    channels, strides = getattr(part, "out_channels", None), getattr(part, "strides", None)
    if not isinstance(channels, Sequence) or not isinstance(strides, Sequence) or len(channels) != len(strides):
        raise DetkitError(
            f"{name} must declare out_channels and strides, one of each a feature map: "
            f"it has out_channels {channels} and strides {strides}"
        )


def build_loss(cfg: Mapping[str, Any], head: nn.Module) -> nn.Module:
    """Build ``cfg["loss"]`` for a head.

    Raises:
        DetkitError: an unknown name or keyword, or a loss that cannot learn from what the head gives.
    """
    loss = LOSSES.build(cfg["loss"])
    given, wanted = (getattr(part, "output", DenseOutput) for part in (head, loss))
    if given is not wanted:
        raise DetkitError(
            f"loss '{cfg['loss']['name']}' learns from {wanted.__name__}, head '{cfg['head']['name']}' gives "
            f"{given.__name__}: leave loss= out, the head then chooses its own"
        )
    return loss


def expand_source(path: Path) -> list[Path]:
    """Return the images of a folder by name, or the one file.

    Raises:
        DetkitError: neither is there or can be read, or the folder holds no images.
    """
    try:
        mode = path.stat().st_mode
        listed = path.iterdir() if stat.S_ISDIR(mode) else ()
        files = sorted(file for file in listed if is_image(file.name))
    except FileNotFoundError:
        raise DetkitError(f"source {shorten(str(path))} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, links in a circle, a NUL character
        reason = getattr(error, "strerror", None) or error
        raise DetkitError(f"cannot read source {shorten(str(path))}: {reason}") from None
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise DetkitError(f"source {shorten(str(path))} is neither a regular file nor a folder")
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DetkitError(f"folder {shorten(str(path))} holds no images (looked for {suffixes})")
    return files


def _pictures(source: Source) -> Iterator[tuple[Path | None, np.ndarray]]:
    """Yield (path, image) for every picture in ``source``, reading one at a time."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise DetkitError(f"an image array must be (H, W, 3) uint8 RGB, this one is {source.shape} {source.dtype}")
        yield None, source
    elif isinstance(source, (str, Path)):
        for file in expand_source(Path(source)):
            yield file, read_image(file)
    elif not isinstance(source, Sequence):
        raise DetkitError(
            f"a source is a path, a folder, an image array or a list of these, not {type(source).__name__}"
        )
    else:
        for item in source:
            yield from _pictures(item)
