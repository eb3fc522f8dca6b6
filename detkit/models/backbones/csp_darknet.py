"""CSPDarknet, the backbone of YOLOv5 and YOLOv8: a stem, then four stages of a stride-2 convolution and a CSP block."""

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import BlockSpec, Conv, build_block, per_stage
from detkit.models.scaling import scaled_depth, scaled_width
from detkit.registry import BACKBONES

STAGES = ((4, 128), (8, 256), (16, 512), (32, 1024))  # stride, base width


@BACKBONES.register("csp_darknet")
class CSPDarknet(nn.Module):
    """CSPDarknet with features at strides 4, 8, 16 and 32.

    Args:
        depth, width, max_channels: compound scaling (models/scaling.py).
        block: CSP block of each stage, (c1, c2, n, shortcut).
        downsample: stride-2 convolution before each stage, (c1, c2, 3, 2).
        repeats: base number of bottlenecks in each stage's block.
        stem_kernel: kernel size of the first convolution, which halves the image; 6 in YOLOv5.
        out_strides: strides of the features to return, ascending; derived by the builder.

    Raises:
        DetkitError: a stride is not available, or a list does not have one entry per stage.
    """

    def __init__(
        self,
        depth: float = 0.33,
        width: float = 0.25,
        max_channels: int = 1024,
        block: BlockSpec | Sequence[BlockSpec] = "c2f",
        downsample: BlockSpec | Sequence[BlockSpec] = "conv",
        repeats: Sequence[int] = (3, 6, 6, 3),
        stem_kernel: int = 3,
        out_strides: Sequence[int] = (8, 16, 32),
    ) -> None:
        super().__init__()
        available = [stride for stride, _ in STAGES]
        if not set(out_strides) <= set(available):
            raise DetkitError(f"backbone csp_darknet has strides {available}, the neck takes {list(out_strides)}")
        if len(repeats) != len(STAGES):
            raise DetkitError(
                f"backbone.repeats={list(repeats)} must list one number for each of the {len(STAGES)} stages"
            )
        blocks = per_stage(block, len(STAGES), "backbone.block")
        downsamples = per_stage(downsample, len(STAGES), "backbone.downsample")
        channels = scaled_width(64, width, max_channels)
        self.stem = Conv(3, channels, stem_kernel, 2)
        self.stages = nn.ModuleList()
        out_channels = []
        for (stride, base), stage_block, stage_down, n in zip(STAGES, blocks, downsamples, repeats, strict=True):
            c2 = scaled_width(base, width, max_channels)
            down = build_block("conv", stage_down, channels, c2, 3, 2)
            csp = build_block("csp", stage_block, c2, c2, scaled_depth(n, depth), True)
            self.stages.append(nn.Sequential(down, csp))
            channels = c2
            if stride in out_strides:
                out_channels.append(c2)
        self.strides = tuple(out_strides)
        self.out_channels = tuple(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) to feature maps (B, out_channels[i], H / strides[i], W / strides[i])."""
        x = self.stem(x)
        features = []
        for (stride, _), stage in zip(STAGES, self.stages, strict=True):
            x = stage(x)
            if stride in self.strides:
                features.append(x)
        return tuple(features)
