"""Keys shared by several commands, composed from the groups in schema.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from detkit.config.fields import Location, field, location, number, whole
from detkit.config.schema import (
    MAX_BATCH,
    AugmentConfig,
    DataConfig,
    HeadConfig,
    ModelConfig,
    Names,
    NeckConfig,
    OptimConfig,
    PartConfig,
    Section,
    TrainerConfig,
)

MAX_IMAGE = 8192  # pixels per side: an input batch of one image takes 800 MB; use tiles for larger images
MAX_WORKERS = 1024
MAX_CLASSES = 100_000
SIZE = "a multiple of 32 pixels, 64 or more"


def _multiple_of_32(size: int) -> int:
    if size % 32:
        raise ValueError("not a multiple of 32")
    return size


def _no_auto(batch_size: Any) -> Any:
    if batch_size == "auto":
        raise PydanticCustomError("message", "batch_size=auto is only for training: use a number")
    return batch_size


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Workers = Literal["auto"] | Annotated[int, Field(ge=0, le=MAX_WORKERS)]
ImageSize = Annotated[int, Field(ge=64, le=MAX_IMAGE), AfterValidator(_multiple_of_32)]
AnyBatch = Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_BATCH)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH), BeforeValidator(_no_auto)]
Url = Annotated[str, Field(pattern="://")]
Merge = Literal["nms", "nmm", "wbf"]
Amp = Literal["auto", "off", "bf16", "fp16"]


def image_size_field() -> Any:
    """Declare a field of type ``ImageSize``."""
    return field("side of the square network input in pixels", SIZE, most=MAX_IMAGE)


def batch_size_field() -> Any:
    """Declare a field of type ``BatchSize``."""
    return field("images per forward pass, over all ranks", "a whole number, 1 or more", most=MAX_BATCH)


class CommonConfig(Section):
    """Keys of every command."""

    device: Device = field("device to compute on", "auto, cpu, cuda or cuda:N")
    workers: Workers = field("number of data loading processes", "auto, or a whole number, 0 or more", most=MAX_WORKERS)
    seed: int = whole("seed of all random numbers", 0, 2**32 - 1)  # NumPy's largest
    run_dir: Location | None = location("run directory, a new or empty folder; null creates one under runs/")
    max_pixels: int = field(
        "largest image size in pixels; larger images are skipped",
        "a whole number from 1 to 2**30",
        ge=1,
        le=2**30,  # OpenCV's own limit
    )
    plugins: Names = field(
        "Python modules to import, which register custom parts", "a list of modules, such as [my_backbone]"
    )


class ViewsConfig(CommonConfig):
    """Keys of the commands that predict: what the network sees of an image besides the whole."""

    tiles: int | None = whole(
        "side of tiles in pixels; images that are larger are also predicted in tiles, at full resolution", 32, 2**20
    )
    overlap: float = number("minimum overlap of adjacent tiles as a fraction of their side", 0, 0.9)
    tta: bool = field("test-time augmentation: also predict each image mirrored and at other scales")
    merge: Merge | None = field(
        "how the boxes of tiles or tta are merged: non-maximum suppression, non-maximum merging or weighted boxes "
        "fusion; null is nmm for tiles alone, else nms"
    )


class ComposedConfig(CommonConfig):
    """Keys of a command that composes a detector."""

    backbone: PartConfig
    neck: NeckConfig
    head: HeadConfig
    loss: PartConfig
    model: ModelConfig
    image_size: ImageSize = image_size_field()


class TrainConfig(ComposedConfig):
    """Keys of ``configs/train.yaml``."""

    batch_size: AnyBatch = field(
        "images per forward pass, over all ranks; auto uses the largest power of two that fits the GPU",
        "a whole number, 1 or more, or auto in training",
        most=MAX_BATCH,
    )
    amp: Amp = field(
        "precision of the forward pass; auto uses bf16 where the device supports it, else fp16 (GPU) or float32 (CPU)"
    )
    rect: bool = field("validate each image in the smallest frame that holds it instead of a square")
    weights: Location | None = location("checkpoint to start from")
    resume: Location | None = location("run directory to resume; auto resumes the run in run_dir if there is one")
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    trainer: TrainerConfig
