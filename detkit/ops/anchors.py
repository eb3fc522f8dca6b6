"""Decoding of boxes relative to anchors, as in YOLOv5."""

import torch
from torch import Tensor


def anchor_boxes(reg: Tensor, points: Tensor, strides: Tensor, anchors: Tensor) -> Tensor:
    """Decode logits (B, A, 4) to xyxy boxes (B, A, 4) in pixels.

    A centre lies up to one cell from its point, ``point + 2 sigmoid(xy) - 1`` in strides; a side is up to four times
    its anchor's, ``4 sigmoid(wh)^2 anchor``.

    Args:
        reg: (B, A, 4) logits x, y, w, h.
        points: (A, 2) cell centres in strides.
        strides: (A, 1) pixels.
        anchors: (A, 2) width, height in pixels.
    """
    xy, wh = reg.sigmoid().chunk(2, -1)
    centres = (points + 2 * xy - 1) * strides
    halves = 2 * wh**2 * anchors
    return torch.cat((centres - halves, centres + halves), -1)
