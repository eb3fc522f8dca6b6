"""What the keys of a configuration mean, and what values they may have: a model a group, a model a task.

The numbers themselves are in ``configs/``; nothing here has a default but what a group of one's own may leave out. The
parts of a detector take arguments of their own, so their mappings are open: what may be in them, the signatures of the
registered classes say (registry.py).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from detkit.config.fields import Location, field, is_number, is_whole, number, path, positive, share, whole

MAX_IMAGE = 8192  # pixels of a side: a batch of one would take 800 MB as the network's input; tiles show more
MAX_BATCH = 65_536
MAX_WORKERS = 1024
MAX_CLASSES = 100_000
MAX_SCALE = 64  # of a model's depth and width; yolov8x has 1.25


class Section(BaseModel):
    """Some keys of a configuration. Types are strict: no text for a number, but a whole number for any number."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _printable(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("cannot be printed")
    return text


def _ascending(strides: list[int]) -> list[int]:
    if not strides or sorted(set(strides)) != strides or strides[0] < 1:
        raise ValueError("not ascending")
    return strides


def _multiple_of_32(size: int) -> int:
    if size % 32:
        raise ValueError("no multiple")
    return size


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


def _no_auto(batch_size: Any) -> Any:
    if batch_size == "auto":
        raise PydanticCustomError("sentence", "batch_size=auto is for training: give it a number")
    return batch_size


Name = Annotated[str, Field(max_length=200), AfterValidator(_printable)]
Names = list[Name]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Workers = Literal["auto"] | Annotated[int, Field(ge=0, le=MAX_WORKERS)]
ImageSize = Annotated[int, Field(ge=64, le=MAX_IMAGE), AfterValidator(_multiple_of_32)]
AnyBatch = Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_BATCH)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH), BeforeValidator(_no_auto)]
Strides = Annotated[list[int], AfterValidator(_ascending)]
Anchors = Annotated[dict[Any, Any], AfterValidator(_anchors)]
ScaleRange = Annotated[list[float], AfterValidator(_scale)]
Loggers = Annotated[Names, AfterValidator(_each_once)]
Factors = dict[str, Annotated[float, Field(gt=0, le=1e6)]]
Url = Annotated[str, Field(pattern="://")]
Amp = Literal["auto", "off", "bf16", "fp16"]

SIZE = "a multiple of 32 pixels, 64 or more"


def _image_size(**limits: Any) -> Any:
    return field("pixels; side of the square that the network sees", SIZE, most=MAX_IMAGE, **limits)


def _batch_size() -> Any:
    return field("images of one forward pass, of all ranks together", "a whole number, 1 or more", most=MAX_BATCH)


class Part(Section):
    """A backbone, a neck, a head or a loss: its registered name, and arguments of its own."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("registered name", "the name of a part")


class Neck(Part):
    """A neck, which asks the backbone for its strides."""

    in_strides: Strides | None = field(
        "pixels; levels that it takes", "a list of strides, ascending, such as [8,16,32]", default=None
    )


class Head(Part):
    """A head, perhaps with anchors."""

    anchors: Anchors = field(
        "width, height, width, ... in pixels at each stride",
        "a mapping of each stride to a list of widths and heights above 0",
        default=None,
    )


class Model(Section):
    """A preset of ``configs/model``: what scales the parts, and what they are made of."""

    model_config = ConfigDict(extra="allow")

    name: Name = field("of the preset", "a name")
    depth: float = positive("factor of the number of blocks", MAX_SCALE, default=None)
    width: float = positive("factor of the number of channels", MAX_SCALE, default=None)
    max_channels: int = whole("of a layer before width scales them", 1, 2**16, default=None)
    backbone: dict[str, Any] = field("arguments of the backbone", "a mapping of arguments", default=None)
    neck: dict[str, Any] = field("arguments of the neck", "a mapping of arguments", default=None)


class Tiles(Section):
    """Large training images seen in parts at full resolution."""

    size: int | None = whole("pixels of a side; null: no tiles", 32, 2**20)
    overlap: float = number("share of the size that neighbours have in common", 0, 0.9)
    share: float = share("of an epoch's tiles, those that show an object")


class Data(Section):
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
    tiles: Tiles | None = field("parts of large images", default=None)
    preset: dict[str, Any] | None = field("defaults for other keys that suit the set", "a mapping", default=None)


class Mosaic(Section):
    """Four images in one."""

    p: float = number("share of the samples", 0, 1)
    off_epochs: int = whole("last epochs without mosaic, copy-paste and mixup")
    partners: Literal["auto", "set", "window"] = field("where the other three come from", default="auto")


class Affine(Section):
    """How an image is scaled, moved and turned."""

    scale: ScaleRange = field("range of the scale factor", "a pair [smallest, largest] of numbers above 0")
    translate: float = number("share of the image size", 0, 1)
    degrees: float = number("turned by up to this, either way", 0, 180, default=0.0)
    shear: float = field("degrees, along x and along y", "a number from 0 to below 45", ge=0, lt=45, default=0.0)


class CopyPaste(Section):
    """Objects of another picture, pasted."""

    p: float = number("share of the samples", 0, 1)
    max_objects: int = whole("1 to this many are pasted", 1, 10_000)
    max_side: float = share("none longer than this share of the image size")


class Mixup(Section):
    """Two pictures blended."""

    p: float = number("share of the samples", 0, 1)
    alpha: float = positive("of the Beta distribution of their shares")


class Augment(Section):
    """What the network sees of a training image."""

    mosaic: Mosaic
    affine: Affine
    copy_paste: CopyPaste = field("see CopyPaste", default=None)
    mixup: Mixup = field("see Mixup", default=None)
    transforms: dict[str, Any] = field(
        "detkit's and albumentations' transforms by name, in order", "a mapping of transforms to their arguments"
    )


class Optim(Section):
    """The optimizer and its learning rate."""

    name: Literal["auto", "sgd", "adamw", "muon"] = field("of the optimizer; auto: by the run's length")
    lr: float | None = positive("learning rate after the warm-up; null: by optimizer and classes")
    momentum: float | None = number("SGD's or Muon's, AdamW's first beta; null: the optimizer's own", 0, 1)
    nominal_batch: int = whole("images of an optimizer step", 1, MAX_BATCH)
    weight_decay: float = number("for nominal_batch images; of weights only", 0)
    shape: Literal["linear", "cosine", "constant", "one_cycle"] = field("of the learning rate over the run")
    final: float = number("share of lr at the end", 0, 1)
    warmup_epochs: float = number("epochs of warm-up", 0)
    warmup_min_batches: int = whole("batches of warm-up at least")
    warmup_momentum: float = number("SGD's at the start of the warm-up", 0, 1)
    warmup_bias_lr: float | None = number("the biases' learning rate there; null: the optimizer's own", 0)
    lr_factors: Factors | None = field(
        "factors of lr by part", "null, or a mapping of parts to numbers above 0, such as {backbone: 0.1}"
    )
    layer_decay: float | None = share("of lr, by which each layer of the backbone learns more slowly than the next")


class Trainer(Section):
    """How long a training runs, what learns, and what is kept."""

    epochs: int = whole("of the run", 1)
    clip_grad_norm: float = field("largest norm of the gradient", "a number above 0", gt=0, allow_inf_nan=True)
    compile: bool = field("torch.compile the network")
    multi_scale: float = number("share of image_size by which a batch's size may differ", 0, 0.9)
    sync_bn: bool = field("batch norms count the images of all ranks")
    rank_timeout: float = positive("seconds that ranks wait for one another", 10_000_000)
    loader_timeout: float = positive("seconds without a batch after which a run ends", 10_000_000)
    freeze: Names = field("parts that do not learn", "a list of parts, such as [backbone.stem]")
    max_bad_steps: int = whole("stop after so many in a row that were not finite", 1)
    patience: int | None = whole("stop after so many epochs without a better AP", 1)
    save_every: int | None = whole("batches between two saved states of an epoch", 1)
    keep_last: int = whole("saved states", 1, 1000)
    log_every: int = whole("batches between two points of the loggers", 1)
    loggers: Loggers = field("beside TensorBoard", "a list of loggers, each once, such as [wandb]")


class Pruner(Section):
    """Which trials of a study end early."""

    name: Literal["median", "hyperband", "none"]
    startup_trials: int = whole("trials before the first is pruned")
    warmup_epochs: int = whole("of a trial before it is pruned")


class Common(Section):
    """What every task takes."""

    device: Device = field("where to compute", "auto, cpu, cuda or cuda:N")
    workers: Workers = field("data loading processes", "auto, or a whole number, 0 or more", most=MAX_WORKERS)
    seed: int = whole("of everything drawn", 0, 2**32 - 1)  # NumPy's largest
    run_dir: Location | None = path("an empty or new folder; null: one under runs/")
    max_pixels: int = field(
        "of an image; larger ones are left out",
        "a whole number from 1 to 2**30",
        ge=1,
        le=2**30,  # OpenCV's own limit
    )
    plugins: Names = field("modules to import", "a list of modules, such as [my_backbone]")


class Composed(Common):
    """A task that composes a detector."""

    backbone: Part
    neck: Neck
    head: Head
    loss: Part
    model: Model
    image_size: ImageSize = _image_size()


class Train(Composed):
    """``configs/train.yaml``."""

    batch_size: AnyBatch = field(
        "images of one forward pass, of all ranks together",
        "a whole number, 1 or more, or in training auto",
        most=MAX_BATCH,
    )
    amp: Amp = field("precision of the forward pass")
    rect: bool = field("validate in frames of like aspect ratio, not in squares")
    weights: Location | None = path("start from this checkpoint")
    resume: Location | None = path("go on with the run in this folder; auto: with the one in run_dir")
    data: Data
    augment: Augment
    optim: Optim
    trainer: Trainer


class Tune(Train):
    """``configs/tune.yaml``."""

    search: Any = field("keys, and the values to try")
    trials: int = whole("of the study", 1)
    pruner: Pruner
    storage: Url | None = field("of a database; null: a file in run_dir", "null, or the URL of a database")


class Eval(Common):
    """``configs/eval.yaml``."""

    data: Data = field("the set; left out: the one that the checkpoint was trained with", default=None)
    ckpt: Location = path("the checkpoint")
    split: str = field("of the set", "the name of a split", min_length=1, max_length=200)
    image_size: ImageSize | None = _image_size()
    batch_size: BatchSize = _batch_size()
    rect: bool = field("frames of like aspect ratio, not squares")
    amp: Amp | None = field("precision of the forward pass; null: as in training")
    score: float = number("keep boxes above this score", 0, 1)
    iou: float = number("drop boxes that overlap a better one by more", 0, 1)
    max_det: int = whole("boxes of an image at most", 1, 100_000)


class Predict(Common):
    """``configs/predict.yaml``."""

    ckpt: Location = path("the checkpoint")
    source: Location = path("a picture, or a folder of pictures")
    image_size: ImageSize | None = _image_size()
    score: float = number("keep boxes above this score", 0, 1)
    iou: float = number("drop boxes that overlap a better one by more", 0, 1)
    max_det: int = whole("boxes of an image at most", 1, 100_000)
    multi_label: bool = field("a box may come once for each of its classes above the score")


class Check(Composed):
    """``configs/check.yaml``."""

    num_classes: int = whole("of the detector", 1, MAX_CLASSES)


class Summary(Composed):
    """``configs/summary.yaml``."""

    num_classes: int = whole("of the detector", 1, MAX_CLASSES)
    depth: int = whole("of the modules that are shown", 1)


class CheckData(Common):
    """``configs/check_data.yaml``."""

    data: Data
    fix: Location | None = path("a new or empty folder for a cleaned copy")
    format: str | None = field("of the copy; null: the set's own", "the name of a format")


class ConvertData(Common):
    """``configs/convert_data.yaml``."""

    data: Data
    dst: Location = path("a new or empty folder")
    format: str = field("to write", "the name of a format")


class ImportWeights(Common):
    """``configs/import_weights.yaml``."""

    src: Location = path("another project's checkpoint")
    dst: Location = path("a new .safetensors")
    sampling: Literal["paper", "tutorial"] | None = field("of AKConv layers in the file; null: not said")
    backbone: Part = field("of a file that holds no more", default=None)
    neck: Neck = field("of the model", default=None)
    head: Head = field("of the model", default=None)
    model: Model = field("that the file holds; left out: told by the tensors", default=None)


class Benchmark(Composed):
    """``configs/benchmark.yaml``."""

    task: str = field("what is measured", "the name of a benchmark")
    data: Data = field("of task=data", default=None)
    augment: Augment
    optim: Optim
    batch_size: BatchSize = _batch_size()
    num_classes: int = whole("of the detector", 1, MAX_CLASSES)
    boxes: int = whole("ground-truth boxes of an image", 0, 10_000)
    rounds: int = whole("timed runs of each variant", 1)
    compile: bool = field("time the compiled step, too")
    peer: Location | None = path("a Python that has ultralytics")


TASKS: dict[str, type[Section]] = {
    "train": Train,
    "tune": Tune,
    "eval": Eval,
    "predict": Predict,
    "check": Check,
    "summary": Summary,
    "check_data": CheckData,
    "convert_data": ConvertData,
    "import_weights": ImportWeights,
    "benchmark": Benchmark,
}
