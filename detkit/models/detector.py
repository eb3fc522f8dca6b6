"""The detector (backbone, neck and head), and building it from a config."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

import detkit.layers  # noqa: F401  (registers the blocks)
from detkit.errors import DetkitError
from detkit.inference.model import TorchModel
from detkit.inference.predictor import PredictOptions, make_predictor
from detkit.inference.sources import Source, open_source
from detkit.models import backbones, heads, losses, necks  # noqa: F401  (register themselves)
from detkit.models.budget import build_on_meta
from detkit.ops.precision import Precision
from detkit.registry import BACKBONES, HEADS, LOSSES, NECKS
from detkit.structures import DenseOutput, Detections


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
        self._model: TorchModel | None = None  # of as_model

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

    def predict(
        self,
        source: Source,
        score: float | Mapping[str, float] = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        *,
        amp: str = "auto",
        **options: Unpack[PredictOptions],
    ) -> list[Detections]:
        """Return the detections in every image or frame of a source: ``stream`` as a list."""
        return list(self.stream(source, score, iou, max_det, amp=amp, **options))

    def stream(
        self,
        source: Source,
        score: float | Mapping[str, float] = 0.25,
        iou: float = 0.7,
        max_det: int = 300,
        *,
        amp: str = "auto",
        **options: Unpack[PredictOptions],
    ) -> Iterator[Detections]:
        """Yield the detections in one image or frame after another; memory does not grow with their number.

        Prediction is fastest on the result of ``fuse()``, whose weights are kept in the precision computed in.

        Args:
            source: an (H, W, 3) uint8 RGB array, a PIL image, a file, folder, glob pattern, video, stream or camera, or
                a list of these: see ``inference/sources.py``.
            score: minimum score (exclusive); a mapping sets it by class name, ``default`` for the others.
            iou: suppress a box if its IoU with a higher-scoring box of its class exceeds this.
            max_det: maximum number of objects per image.
            amp: precision of the network: auto, off, bf16 or fp16.
            **options: see PredictOptions.

        Raises:
            DetkitError: the source or a value is invalid.
            UnreadableImage: a file is not a readable image.
        """
        was_training = self.training
        try:
            predictor = make_predictor(self.as_model(amp), score, iou, max_det, **options)
            for _, found in predictor.run(open_source(source)):
                yield found
        finally:
            self.train(was_training)

    def as_model(self, amp: str = "auto") -> TorchModel:
        """Return what ``Predictor`` and ``evaluate`` run: this detector in a precision (auto, off, bf16 or fp16).

        That of a fused detector, a copy of its weights in this precision, is kept for the next call.
        """
        precision = Precision.from_config(amp, next(self.parameters()).device)
        if not self.is_fused:
            return TorchModel(self, precision)
        if self._model is None or self._model.precision != precision:
            self._model = None  # not to be copied
            self._model = TorchModel(self, precision)
        return self._model

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
