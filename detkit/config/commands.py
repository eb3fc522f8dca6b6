"""What each command takes: a model a task, of the groups in schema.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from detkit.config.fields import Location, field, number, path, whole
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
    PrunerConfig,
    Section,
    TrainerConfig,
)

MAX_IMAGE = 8192  # pixels of a side: a batch of one would take 800 MB as the network's input; tiles show more
MAX_WORKERS = 1024
MAX_CLASSES = 100_000
SIZE = "a multiple of 32 pixels, 64 or more"


def _multiple_of_32(size: int) -> int:
    if size % 32:
        raise ValueError("no multiple")
    return size


def _no_auto(batch_size: Any) -> Any:
    if batch_size == "auto":
        raise PydanticCustomError("sentence", "batch_size=auto is for training: give it a number")
    return batch_size


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Workers = Literal["auto"] | Annotated[int, Field(ge=0, le=MAX_WORKERS)]
ImageSize = Annotated[int, Field(ge=64, le=MAX_IMAGE), AfterValidator(_multiple_of_32)]
AnyBatch = Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_BATCH)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH), BeforeValidator(_no_auto)]
Url = Annotated[str, Field(pattern="://")]
Amp = Literal["auto", "off", "bf16", "fp16"]


def _image_size(**limits: Any) -> Any:
    return field("pixels; side of the square that the network sees", SIZE, most=MAX_IMAGE, **limits)


def _batch_size() -> Any:
    return field("images of one forward pass, of all ranks together", "a whole number, 1 or more", most=MAX_BATCH)


class CommonConfig(Section):
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


class ComposedConfig(CommonConfig):
    """A task that composes a detector."""

    backbone: PartConfig
    neck: NeckConfig
    head: HeadConfig
    loss: PartConfig
    model: ModelConfig
    image_size: ImageSize = _image_size()


class TrainConfig(ComposedConfig):
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
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    trainer: TrainerConfig


class TuneConfig(TrainConfig):
    """``configs/tune.yaml``."""

    search: Any = field("keys, and the values to try")
    trials: int = whole("of the study", 1)
    pruner: PrunerConfig
    storage: Url | None = field("of a database; null: a file in run_dir", "null, or the URL of a database")


class EvalConfig(CommonConfig):
    """``configs/eval.yaml``."""

    data: DataConfig = field("the set; left out: the one that the checkpoint was trained with", default=None)
    ckpt: Location = path("the checkpoint")
    split: str = field("of the set", "the name of a split", min_length=1, max_length=200)
    image_size: ImageSize | None = _image_size()
    batch_size: BatchSize = _batch_size()
    rect: bool = field("frames of like aspect ratio, not squares")
    amp: Amp | None = field("precision of the forward pass; null: as in training")
    score: float = number("keep boxes above this score", 0, 1)
    iou: float = number("drop boxes that overlap a better one by more", 0, 1)
    max_det: int = whole("boxes of an image at most", 1, 100_000)


class PredictConfig(CommonConfig):
    """``configs/predict.yaml``."""

    ckpt: Location = path("the checkpoint")
    source: Location = path("a picture, or a folder of pictures")
    image_size: ImageSize | None = _image_size()
    score: float = number("keep boxes above this score", 0, 1)
    iou: float = number("drop boxes that overlap a better one by more", 0, 1)
    max_det: int = whole("boxes of an image at most", 1, 100_000)
    multi_label: bool = field("a box may come once for each of its classes above the score")


class CheckConfig(ComposedConfig):
    """``configs/check.yaml``."""

    num_classes: int = whole("of the detector", 1, MAX_CLASSES)


class SummaryConfig(ComposedConfig):
    """``configs/summary.yaml``."""

    num_classes: int = whole("of the detector", 1, MAX_CLASSES)
    depth: int = whole("of the modules that are shown", 1)


class CheckDataConfig(CommonConfig):
    """``configs/check_data.yaml``."""

    data: DataConfig
    fix: Location | None = path("a new or empty folder for a cleaned copy")
    format: str | None = field("of the copy; null: the set's own", "the name of a format")


class ConvertDataConfig(CommonConfig):
    """``configs/convert_data.yaml``."""

    data: DataConfig
    dst: Location = path("a new or empty folder")
    format: str = field("to write", "the name of a format")


class ImportWeightsConfig(CommonConfig):
    """``configs/import_weights.yaml``."""

    src: Location = path("another project's checkpoint")
    dst: Location = path("a new .safetensors")
    sampling: Literal["paper", "tutorial"] | None = field("of AKConv layers in the file; null: not said")
    backbone: PartConfig = field("of a file that holds no more", default=None)
    neck: NeckConfig = field("of the model", default=None)
    head: HeadConfig = field("of the model", default=None)
    model: ModelConfig = field("that the file holds; left out: told by the tensors", default=None)


class BenchmarkConfig(ComposedConfig):
    """``configs/benchmark.yaml``."""

    task: str = field("what is measured", "the name of a benchmark")
    data: DataConfig = field("of task=data", default=None)
    augment: AugmentConfig
    optim: OptimConfig
    batch_size: BatchSize = _batch_size()
    num_classes: int = whole("of the detector", 1, MAX_CLASSES)
    boxes: int = whole("ground-truth boxes of an image", 0, 10_000)
    rounds: int = whole("timed runs of each variant", 1)
    compile: bool = field("time the compiled step, too")
    peer: Location | None = path("a Python that has ultralytics")


TASKS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "tune": TuneConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "check": CheckConfig,
    "summary": SummaryConfig,
    "check_data": CheckDataConfig,
    "convert_data": ConvertDataConfig,
    "import_weights": ImportWeightsConfig,
    "benchmark": BenchmarkConfig,
}
