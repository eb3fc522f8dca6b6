"""YOLOv8's decoupled, anchor-free head; the distances to the four sides are distributions (arXiv 2006.04388)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import Conv
from detkit.ops.boxes import dfl_expectation, ltrb_to_xyxy
from detkit.ops.points import make_grid_points
from detkit.registry import HEADS
from detkit.structures import DenseOutput

MAX_BINS = 1024  # in strides, more than any image has


@HEADS.register("yolov8")
class YOLOv8Head(nn.Module):
    """One box branch and one class branch per level: 3x3, 3x3, 1x1.

    Args:
        in_channels, strides: of the neck's features, derived by the builder.
        num_classes: C, derived from the data.
        reg_max: number of bins of a distance's distribution, for 0 .. reg_max - 1 strides.

    Raises:
        DetkitError: ``reg_max`` is out of range.
    """

    output = DenseOutput

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], num_classes: int, reg_max: int = 16) -> None:
        super().__init__()
        if not 2 <= reg_max <= MAX_BINS:
            raise DetkitError(f"head.reg_max={reg_max} must be a whole number from 2 to {MAX_BINS}")
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.reg_max = reg_max
        c_box = max(16, in_channels[0] // 4, 4 * reg_max)
        c_cls = max(in_channels[0], min(num_classes, 100))
        self.box_branches = nn.ModuleList(
            nn.Sequential(Conv(c, c_box, 3), Conv(c_box, c_box, 3), nn.Conv2d(c_box, 4 * reg_max, 1))
            for c in in_channels
        )
        self.cls_branches = nn.ModuleList(
            nn.Sequential(Conv(c, c_cls, 3), Conv(c_cls, c_cls, 3), nn.Conv2d(c_cls, num_classes, 1))
            for c in in_channels
        )
        # Constant, but a parameter, since published parameter counts include it.
        self.bins = nn.Parameter(torch.tensor(range(reg_max), dtype=torch.float32), requires_grad=False)

    def init_bias(self) -> None:
        """Initialize biases for about 5 objects per image of 640 px, of any class, with small boxes."""
        with torch.no_grad():
            for box, cls, stride in zip(self.box_branches, self.cls_branches, self.strides, strict=True):
                box.get_parameter("2.bias").fill_(1.0)
                cls.get_parameter("2.bias").fill_(math.log(5 / self.num_classes / (640 / stride) ** 2))

    def forward(self, features: Sequence[Tensor]) -> DenseOutput:
        """Map features (B, c, h, w), finest first, to a DenseOutput over all points."""
        reg = [branch(x) for branch, x in zip(self.box_branches, features, strict=True)]
        cls = [branch(x) for branch, x in zip(self.cls_branches, features, strict=True)]
        points, strides = make_grid_points([x.shape[-2:] for x in features], self.strides, features[0].device)
        return DenseOutput(_flatten(cls), _flatten(reg), points, strides)

    def decode(self, out: DenseOutput) -> tuple[Tensor, Tensor]:
        """Return boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1, both float32."""
        distances = dfl_expectation(out.reg.float(), self.bins.float())
        return ltrb_to_xyxy(distances, out.points) * out.strides, out.cls.float().sigmoid()


def _flatten(maps: list[Tensor]) -> Tensor:
    """Concatenate maps (B, c, h, w) of several levels to (B, A, c); no copy of a channels-last map before that."""
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], 1)
