"""YOLOv5's head: one 1x1 convolution per level predicts box, objectness and classes for every anchor."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.ops.anchors import anchor_boxes
from detkit.ops.points import make_grid_points
from detkit.registry import HEADS
from detkit.structures import AnchorOutput


@HEADS.register("yolov5")
class YOLOv5Head(nn.Module):
    """Anchor-based head; a score is objectness times class probability.

    Args:
        in_channels, strides: of the neck's features, derived by the builder.
        num_classes: C, derived from the data.
        anchors: for each stride width, height, width, height, ... in pixels; the same number at every stride.

    Raises:
        DetkitError: the anchors of a stride are missing or invalid.
    """

    output = AnchorOutput
    anchors_la2: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        anchors: Mapping[int, Sequence[float]],
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.num_classes = num_classes
        anchors_l = _anchors_of(strides, anchors)
        self.register_buffer("anchors_la2", anchors_l)  # saved with the weights, which depend on it
        channels = anchors_l.shape[1] * (5 + num_classes)
        self.predictions = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)

    def init_bias(self) -> None:
        """Initialize biases for about 8 objects per image of 640 px and a class probability of 0.6 / C."""
        with torch.no_grad():
            for conv, stride in zip(self.predictions, self.strides, strict=True):
                bias_ao = conv.get_parameter("bias").view(self.anchors_la2.shape[1], -1)
                bias_ao[:, 4] += math.log(8 / (640 / stride) ** 2)
                bias_ao[:, 5:] += math.log(0.6 / (self.num_classes - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> AnchorOutput:
        """Map features (B, c, h, w), finest first, to an AnchorOutput over all points and anchors."""
        per_cell = self.anchors_la2.shape[1]
        maps, anchors = [], []
        for conv, x, anchors_a2 in zip(self.predictions, features, self.anchors_la2, strict=True):
            batch, _, h, w = x.shape
            maps.append(conv(x).permute(0, 2, 3, 1).reshape(batch, h * w * per_cell, 5 + self.num_classes))
            anchors.append(anchors_a2.repeat(h * w, 1))
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        points, strides = make_grid_points(sizes, self.strides, features[0].device)
        reg, objectness, cls = torch.cat(maps, 1).split((4, 1, self.num_classes), -1)
        return AnchorOutput(
            cls,
            reg,
            points.repeat_interleave(per_cell, 0),
            strides.repeat_interleave(per_cell, 0),
            objectness,
            torch.cat(anchors),
            tuple((h, w, per_cell) for h, w in sizes),
        )

    def decode(self, out: AnchorOutput) -> tuple[Tensor, Tensor]:
        """Return boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1, both float32."""
        boxes = anchor_boxes(out.reg.float(), out.points, out.strides, out.anchors)
        return boxes, out.objectness.float().sigmoid() * out.cls.float().sigmoid()


def _anchors_of(strides: Sequence[int], anchors: Mapping[int, Sequence[float]]) -> Tensor:
    """Return the anchors of each stride, (levels, anchors, 2) in pixels.

    Raises:
        DetkitError: the anchors of a stride are missing or invalid.
    """
    by_stride = {int(stride): sides for stride, sides in anchors.items()}  # JSON in checkpoints has string keys
    missing = [stride for stride in strides if stride not in by_stride]
    if missing:
        raise DetkitError(
            f"head.anchors has none for stride {missing[0]} of the neck: add them, it has those of {list(by_stride)}"
        )
    chosen = [by_stride[stride] for stride in strides]
    if len({len(sides) for sides in chosen}) > 1 or len(chosen[0]) % 2 or not chosen[0]:
        raise DetkitError("head.anchors must list width, height, width, height, ..., the same number at every stride")
    return torch.tensor(chosen, dtype=torch.float32).view(len(chosen), -1, 2)
