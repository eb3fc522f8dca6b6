"""What the keys of a configuration mean, and what values they may have: a model a group, a model a task.

The numbers themselves are in ``configs/``; nothing here has a default but what a group of one's own may leave out. The
parts of a detector take arguments of their own, so their mappings are open: what may be in them, the signatures of the
registered classes say (registry.py).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from detkit.config.fields import Location, field, is_number, is_whole, number, path, positive, share, whole
from detkit.errors import is_name

MAX_BATCH = 65_536
MAX_SCALE = 64  # of a model's depth and width; yolov8x has 1.25


class Section(BaseModel):
    """Some keys of a configuration. Types are strict: no text for a number, but a whole number for any number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """Return the keys that were given, groups as plain dicts: what a file or a checkpoint keeps."""
        return self.model_dump(exclude_unset=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values for some keys."""
        return self.model_copy(update=changes)


def _printable(text: str) -> str:
    if not is_name(text):
        raise ValueError("cannot be printed")
    return text


def _ascending(strides: list[int]) -> list[int]:
    if not strides or sorted(set(strides)) != strides or strides[0] < 1:
        raise ValueError("not ascending")
    return strides


def _each_once(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("twice")
    return names


def _anchors(anchors: dict) -> dict:
    for stride, sides in anchors.items():
        if not is_whole(stride, 1) and not (isinstance(stride, str) and stride.isdecimal()):  # text in json
            raise ValueError("no stride")
        if not isinstance(sides, list) or not all(is_number(side, 1e-6, 1e6) for side in sides):
            raise ValueError("no sides")
    return anchors


def _scale(pair: list[float]) -> list[float]:
    if len(pair) != 2 or not 1e-3 <= pair[0] <= pair[1] <= 100:
        raise ValueError("no pair")
    return pair


Name = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Names = list[Name]
Strides = Annotated[list[int], AfterValidator(_ascending)]
Anchors = Annotated[dict[Any, Any], AfterValidator(_anchors)]
ScaleRange = Annotated[list[float], AfterValidator(_scale)]
Loggers = Annotated[Names, AfterValidator(_each_once)]
Factors = dict[str, Annotated[float, Field(gt=0, le=1e6)]]


class PartConfig(Section):
    """A backbone, a neck, a head or a loss: its registered name, and arguments of its own."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("registered name", "the name of a part")


class NeckConfig(PartConfig):
    """A neck, which asks the backbone for its strides."""

    in_strides: Strides | None = field(
        "pixels; levels that it takes", "a list of strides, ascending, such as [8,16,32]", default=None
    )


class HeadConfig(PartConfig):
    """A head, perhaps with anchors."""

    anchors: Anchors = field(
        "width, height, width, ... in pixels at each stride",
        "a mapping of each stride to a list of widths and heights above 0",
        default=None,
    )


class ModelConfig(Section):
    """A preset of ``configs/model``: what scales the parts, and what they are made of."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("of the preset", "a name")
    depth: float = positive("factor of the number of blocks", MAX_SCALE, default=None)
    width: float = positive("factor of the number of channels", MAX_SCALE, default=None)
    max_channels: int = whole("of a layer before width scales them", 1, 2**16, default=None)
    backbone: dict[str, Any] = field("arguments of the backbone", "a mapping of arguments", default=None)
    neck: dict[str, Any] = field("arguments of the neck", "a mapping of arguments", default=None)


class TilesConfig(Section):
    """Large training images seen in parts at full resolution."""

    size: int | None = whole("pixels of a side; null: no tiles", 32, 2**20)
    overlap: float = number("share of the size that neighbours have in common", 0, 0.9)
    positive_fraction: float = share("of an epoch's tiles, those that show an object")


class DataConfig(Section):
    """A data set: the name of its reader, what every reader takes, and arguments of its own."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("of the reader", "the name of a data set")
    root: Location | None = path("folder of the set", default=None)
    yaml: Location = path("data.yaml of a YOLO set", default=None)
    images: Location | None = path("folder of the images of a VOC set", default=None)
    one_based: bool = field("pixels of a VOC set count from 1", default=None)
    strict: bool = field("refuse a set with problems", default=False)
    allow_empty: bool = field("go on with a split that holds no boxes", default=False)
    cache: Literal["ram", "disk"] | None = field("where decoded images are kept", default=None)
    sampling: Literal["repeat_factor", "class_balanced"] | None = field("how often images come", default=None)
    repeat_threshold: float = share("of the images: a class that fewer show is rare", default=None)
    tiles: TilesConfig | None = field("parts of large images", default=None)
    preset: dict[str, Any] | None = field("defaults for other keys that suit the set", "a mapping", default=None)


class MosaicConfig(Section):
    """Four images in one."""

    p: float = number("share of the samples", 0, 1)
    close_epochs: int = whole("last epochs without mosaic, copy-paste and mixup")
    partners: Literal["auto", "set", "window"] = field("where the other three come from", default="auto")


class AffineConfig(Section):
    """How an image is scaled, moved and turned."""

    scale: ScaleRange = field("range of the scale factor", "a pair [smallest, largest] of numbers above 0")
    translate: float = number("share of the image size", 0, 1)
    degrees: float = number("turned by up to this, either way", 0, 180, default=0.0)
    shear: float = field("degrees, along x and along y", "a number from 0 to below 45", ge=0, lt=45, default=0.0)


class CopyPasteConfig(Section):
    """Objects of another picture, pasted."""

    p: float = number("share of the samples", 0, 1)
    max_objects: int = whole("1 to this many are pasted", 1, 10_000)
    max_side: float = share("none longer than this share of the image size")


class MixupConfig(Section):
    """Two pictures blended."""

    p: float = number("share of the samples", 0, 1)
    alpha: float = positive("of the Beta distribution of their shares")


class AugmentConfig(Section):
    """What the network sees of a training image."""

    mosaic: MosaicConfig
    affine: AffineConfig
    copy_paste: CopyPasteConfig = field("see CopyPaste", default=None)
    mixup: MixupConfig = field("see Mixup", default=None)
    transforms: dict[str, Any] = field(
        "detkit's and albumentations' transforms by name, in order", "a mapping of transforms to their arguments"
    )


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "adamw", "muon"] = field("of the optimizer; auto: by the run's length")
    lr: float | None = positive("learning rate after the warm-up; null: by optimizer and classes")
    momentum: float | None = number("SGD's or Muon's, AdamW's first beta; null: the optimizer's own", 0, 1)
    nominal_batch: int = whole("images of an optimizer step", 1, MAX_BATCH)
    weight_decay: float = number("for nominal_batch images; of weights only", 0)
    schedule: Literal["linear", "cosine", "constant", "one_cycle"] = field("of the learning rate over the run")
    final_lr_factor: float = number("share of lr at the end", 0, 1)
    warmup_epochs: float = number("epochs of warm-up", 0)
    warmup_min_batches: int = whole("batches of warm-up at least")
    warmup_momentum: float = number("SGD's at the start of the warm-up", 0, 1)
    warmup_bias_lr: float | None = number("the biases' learning rate there; null: the optimizer's own", 0)
    lr_factors: Factors | None = field(
        "factors of lr by part", "null, or a mapping of parts to numbers above 0, such as {backbone: 0.1}"
    )
    layer_decay: float | None = share("of lr, by which each layer of the backbone learns more slowly than the next")


class TrainerConfig(Section):
    """How long a training runs, what learns, and what is kept."""

    epochs: int = whole("of the run", 1)
    clip_grad_norm: float = field("largest norm of the gradient", "a number above 0", gt=0, allow_inf_nan=True)
    compile: bool = field("torch.compile the network")
    multi_scale: float = number("share of image_size by which a batch's size may differ", 0, 0.9)
    sync_bn: bool = field("batch norms count the images of all ranks")
    rank_timeout: float = positive("seconds that ranks wait for one another", 10_000_000)
    loader_timeout: float = positive("seconds without a batch after which a run ends", 10_000_000)
    freeze: Names = field("parts that do not learn", "a list of parts, such as [backbone.stem]")
    max_nonfinite_steps: int = whole("stop after so many in a row that were not finite", 1)
    patience: int | None = whole("stop after so many epochs without a better AP", 1)
    save_every: int | None = whole("batches between two saved states of an epoch", 1)
    keep_last: int = whole("saved states", 1, 1000)
    log_every: int = whole("batches between two points of the loggers", 1)
    loggers: Loggers = field("beside TensorBoard", "a list of loggers, each once, such as [wandb]")


class PrunerConfig(Section):
    """Which trials of a study end early."""

    name: Literal["median", "hyperband", "none"]
    startup_trials: int = whole("trials before the first is pruned")
    warmup_epochs: int = whole("of a trial before it is pruned")
