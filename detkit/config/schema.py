"""The keys of a configuration, their meaning and allowed values: one pydantic model per group.

Default values are in ``configs/``; only keys that the file of a custom option may omit have one here. The sections of a
detector's parts are open: arguments are checked against the signatures of the registered classes (registry.py).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from detkit.config.fields import Location, field, fraction, is_number, is_whole, location, number, positive, whole
from detkit.errors import is_name

MAX_BATCH = 65_536
MAX_SCALE = 64  # of a model's depth and width; yolov8x has 1.25


class Section(BaseModel):
    """Base class of all models. Types are strict, except that an integer is accepted as a float."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """Return the keys that were set, groups as plain dicts, as stored in files and checkpoints."""
        return self.model_dump(exclude_unset=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some values replaced."""
        return self.model_copy(update=changes)


def _printable(text: str) -> str:
    if not is_name(text):
        raise ValueError("not printable")
    return text


def _ascending(strides: list[int]) -> list[int]:
    if not strides or sorted(set(strides)) != strides or strides[0] < 1:
        raise ValueError("not ascending")
    return strides


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("duplicate")
    return names


def _anchors(anchors: dict) -> dict:
    for stride, sides in anchors.items():
        if not is_whole(stride, 1) and not (isinstance(stride, str) and stride.isdecimal()):  # keys are text in JSON
            raise ValueError("not a stride")
        if not isinstance(sides, list) or not all(is_number(side, 1e-6, 1e6) for side in sides):
            raise ValueError("not side lengths")
    return anchors


def _scale(pair: list[float]) -> list[float]:
    if len(pair) != 2 or not 1e-3 <= pair[0] <= pair[1] <= 100:
        raise ValueError("not a pair")
    return pair


Name = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Names = list[Name]
Strides = Annotated[list[int], AfterValidator(_ascending)]
Anchors = Annotated[dict[Any, Any], AfterValidator(_anchors)]
ScaleRange = Annotated[list[float], AfterValidator(_scale)]
Loggers = Annotated[Names, AfterValidator(_each_once)]
Factors = dict[str, Annotated[float, Field(gt=0, le=1e6)]]


class PartConfig(Section):
    """A backbone, neck, head or loss: its registered name and its arguments."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("name under which the part is registered", "the name of a part")


class NeckConfig(PartConfig):
    """A neck, which selects the backbone's strides."""

    in_strides: Strides | None = field(
        "strides, in pixels, of the feature maps that the neck takes from the backbone",
        "a list of strides, ascending, such as [8,16,32]",
        default=None,
    )


class HeadConfig(PartConfig):
    """A head, optionally with anchors."""

    anchors: Anchors = field(
        "anchor sizes at each stride, as width, height, width, height, ... in pixels",
        "a mapping of each stride to a list of widths and heights above 0",
        default=None,
    )


class ModelConfig(Section):
    """A preset of ``configs/model``: scales of the parts and their blocks."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("name of the preset", "a name")
    depth: float = positive("depth multiplier: scales the number of blocks in each stage", MAX_SCALE, default=None)
    width: float = positive("width multiplier: scales the number of channels", MAX_SCALE, default=None)
    max_channels: int = whole(
        "upper limit on the channels of a layer, before width scales them", 1, 2**16, default=None
    )
    backbone: dict[str, Any] = field(
        "backbone arguments that belong to this preset", "a mapping of arguments", default=None
    )
    neck: dict[str, Any] = field("neck arguments that belong to this preset", "a mapping of arguments", default=None)


class TilesConfig(Section):
    """Tiling of large training images at full resolution."""

    size: int | None = whole("side of a training tile in pixels; null disables tiling", 32, 2**20)
    overlap: float = number("overlap of neighboring tiles, as a fraction of the tile size", 0, 0.9)
    positive_fraction: float = fraction("fraction of each epoch's tiles that contain an object")


class DataConfig(Section):
    """A data set: the name of its reader, options common to all readers, and arguments of this reader."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("name of the format reader", "the name of a data set")
    root: Location | None = location("root folder of the data set", default=None)
    yaml: Location = location("path of the data.yaml (YOLO)", default=None)
    images: Location | None = location(
        "image folder, relative to root; null looks for JPEGImages or images (VOC)", default=None
    )
    one_based: bool = field("pixel coordinates start at 1, as in the original Pascal VOC", default=None)
    strict: bool = field(
        "stop with an error if the labels have problems, instead of fixing or skipping them", default=False
    )
    allow_empty: bool = field("accept a train or val split without any boxes", default=False)
    cache: Literal["ram", "disk"] | None = field(
        "where to cache decoded images; null keeps up to 128 MiB per loader process", default=None
    )
    sampling: Literal["repeat_factor", "class_balanced"] | None = field(
        "how often images are drawn; null draws each image once per epoch", default=None
    )
    repeat_threshold: float = fraction(
        "classes in a smaller fraction of the images than this are oversampled by repeat_factor", default=None
    )
    tiles: TilesConfig | None = field("tiling of large training images", default=None)
    preset: dict[str, Any] | None = field(
        "defaults for keys of other groups that suit this data set", "a mapping", default=None
    )


class MosaicConfig(Section):
    """Mosaic of four images."""

    p: float = number("probability of building a sample from four images", 0, 1)
    close_epochs: int = whole("number of final epochs without mosaic, copy-paste and mixup")
    partners: Literal["auto", "set", "window"] = field(
        "where the other three images are drawn from: the whole set, or a window of the epoch's order", default="auto"
    )


class AffineConfig(Section):
    """Random scaling, translation, rotation and shear."""

    scale: ScaleRange = field(
        "range from which the scale factor is drawn", "a pair [smallest, largest] of numbers above 0"
    )
    translate: float = number("maximum shift, as a fraction of the image size", 0, 1)
    degrees: float = number("maximum rotation in either direction, in degrees", 0, 180, default=0.0)
    shear: float = field(
        "maximum shear along each axis, in degrees", "a number from 0 to below 45", ge=0, lt=45, default=0.0
    )


class CopyPasteConfig(Section):
    """Copy-paste of objects from another image."""

    p: float = number("probability of pasting objects into a sample", 0, 1)
    max_objects: int = whole("maximum number of objects pasted into an image", 1, 10_000)
    max_side: float = fraction("longest side of a pasted object, as a fraction of the image size")


class MixupConfig(Section):
    """Blending of two images."""

    p: float = number("probability of blending a sample with another image", 0, 1)
    alpha: float = positive("parameter of the Beta(alpha, alpha) distribution of the blending weight")


class AugmentConfig(Section):
    """Augmentation of training images."""

    mosaic: MosaicConfig
    affine: AffineConfig
    copy_paste: CopyPasteConfig = field("copy-paste of objects between images", default=None)
    mixup: MixupConfig = field("mixup of two images", default=None)
    transforms: dict[str, Any] = field(
        "transforms applied in this order, from detkit or, by class name, from albumentations",
        "a mapping of transforms to their arguments",
    )


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "adamw", "muon"] = field(
        "optimizer; auto uses AdamW below 10,000 optimizer steps and SGD otherwise"
    )
    lr: float | None = positive("learning rate after warm-up; null chooses it by optimizer and number of classes")
    momentum: float | None = number(
        "momentum of SGD or Muon, or first beta of AdamW; null uses the optimizer's own default", 0, 1
    )
    nominal_batch: int = whole("images per optimizer step; gradients of smaller batches are accumulated", 1, MAX_BATCH)
    weight_decay: float = number(
        "weight decay for nominal_batch images per step; applies to weights, not to biases or norms", 0
    )
    schedule: Literal["linear", "cosine", "constant", "one_cycle"] = field("shape of the learning-rate schedule")
    final_lr_factor: float = number("final learning rate, as a fraction of lr", 0, 1)
    warmup_epochs: float = number("length of the warm-up in epochs", 0)
    warmup_min_batches: int = whole("minimum length of the warm-up in batches")
    warmup_momentum: float = number("momentum of SGD at the start of the warm-up", 0, 1)
    warmup_bias_lr: float | None = number(
        "learning rate of the biases at the start of the warm-up; null uses the optimizer's own default", 0
    )
    lr_factors: Factors | None = field(
        "learning-rate multipliers by module name; the longest matching name applies",
        "null, or a mapping of modules to numbers above 0, such as {backbone: 0.1}",
    )
    layer_decay: float | None = fraction(
        "layer-wise decay: the learning rate of each backbone layer, as a fraction of the next layer's"
    )


class TrainerConfig(Section):
    """Length of a training run, what is trained, saving and logging."""

    epochs: int = whole("number of epochs to train", 1)
    clip_grad_norm: float = field(
        "maximum gradient norm; larger gradients are scaled down to it", "a number above 0", gt=0, allow_inf_nan=True
    )
    compile: bool = field("compile the network with torch.compile")
    multi_scale: float = number(
        "range of the size drawn for each batch, as a fraction of image_size in either direction", 0, 0.9
    )
    sync_bn: bool = field("compute batch-norm statistics over the images of all ranks")
    rank_timeout: float = positive("seconds to wait for another rank before it counts as dead", 10_000_000)
    loader_timeout: float = positive("seconds to wait for a batch before the run saves and ends", 10_000_000)
    freeze: Names = field("modules that are not trained", "a list of modules, such as [backbone.stem]")
    max_nonfinite_steps: int = whole("consecutive steps with a non-finite loss or gradient after which the run ends", 1)
    patience: int | None = whole(
        "epochs in a row with an AP below the best after which the run stops; null never stops early", 1
    )
    save_every: int | None = whole(
        "batches between two saves within an epoch; null saves only at the end of each epoch", 1
    )
    keep_last: int = whole("number of saved training states to keep", 1, 1000)
    log_every: int = whole("batches between two points in the loggers, or two lines in a log file", 1)
    loggers: Loggers = field(
        "loggers to use in addition to TensorBoard", "a list of loggers, each once, such as [wandb]"
    )


class PrunerConfig(Section):
    """Pruning of unpromising trials."""

    name: Literal["median", "hyperband", "none"] = field("algorithm that ends unpromising trials early")
    startup_trials: int = whole("completed trials before any is pruned (median)")
    warmup_epochs: int = whole(
        "epochs of a trial before it may be pruned (median), or of the shortest trials (hyperband)"
    )
