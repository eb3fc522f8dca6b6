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
    return field("side of the square network input in pixels", SIZE, most=MAX_IMAGE, **limits)


def _batch_size() -> Any:
    return field("images per forward pass, over all ranks", "a whole number, 1 or more", most=MAX_BATCH)


class CommonConfig(Section):
    """What every task takes."""

    device: Device = field("device to compute on", "auto, cpu, cuda or cuda:N")
    workers: Workers = field("number of data loading processes", "auto, or a whole number, 0 or more", most=MAX_WORKERS)
    seed: int = whole("seed of all random numbers", 0, 2**32 - 1)  # NumPy's largest
    run_dir: Location | None = path("run directory, a new or empty folder; null creates one under runs/")
    max_pixels: int = field(
        "largest image size in pixels; larger images are skipped",
        "a whole number from 1 to 2**30",
        ge=1,
        le=2**30,  # OpenCV's own limit
    )
    plugins: Names = field(
        "Python modules to import, which register parts of your own", "a list of modules, such as [my_backbone]"
    )


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
        "images per forward pass, over all ranks; auto uses the largest power of two that fits the GPU",
        "a whole number, 1 or more, or in training auto",
        most=MAX_BATCH,
    )
    amp: Amp = field(
        "precision of the forward pass; auto uses bf16 where the device supports it, else fp16 (GPU) or float32 (CPU)"
    )
    rect: bool = field("validate each image in the smallest frame that holds it instead of a square")
    weights: Location | None = path("checkpoint to start from")
    resume: Location | None = path("run directory to resume; auto resumes the run in run_dir if there is one")
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    trainer: TrainerConfig


class TuneConfig(TrainConfig):
    """``configs/tune.yaml``."""

    search: Any = field("mapping of keys to the values to try: lists of choices, or ranges {low, high}")
    trials: int = whole("total number of trials in the study", 1)
    pruner: PrunerConfig
    storage: Url | None = field(
        "URL of the study's database; null keeps the study in a file in run_dir", "null, or the URL of a database"
    )


class EvalConfig(CommonConfig):
    """``configs/eval.yaml``."""

    data: DataConfig = field("data set; by default the one the checkpoint was trained with", default=None)
    ckpt: Location = path("checkpoint to load")
    split: str = field("split to evaluate", "the name of a split", min_length=1, max_length=200)
    image_size: ImageSize | None = _image_size()
    batch_size: BatchSize = _batch_size()
    rect: bool = field("evaluate each image in the smallest frame that holds it instead of a square")
    amp: Amp | None = field("precision of the forward pass; null uses that of the training")
    score: float = number("minimum score of a detection", 0, 1)
    iou: float = number("IoU threshold of non-maximum suppression", 0, 1)
    max_det: int = whole("maximum number of detections per image", 1, 100_000)


class PredictConfig(CommonConfig):
    """``configs/predict.yaml``."""

    ckpt: Location = path("checkpoint to load")
    source: Location = path("image file, or a folder of images")
    image_size: ImageSize | None = _image_size()
    score: float = number("minimum score of a detection", 0, 1)
    iou: float = number("IoU threshold of non-maximum suppression", 0, 1)
    max_det: int = whole("maximum number of detections per image", 1, 100_000)
    multi_label: bool = field(
        "report a box once for each of its classes above the score, instead of for its best class only"
    )


class CheckConfig(ComposedConfig):
    """``configs/check.yaml``."""

    num_classes: int = whole("number of classes", 1, MAX_CLASSES)


class SummaryConfig(ComposedConfig):
    """``configs/summary.yaml``."""

    num_classes: int = whole("number of classes", 1, MAX_CLASSES)
    depth: int = whole("nesting depth of the modules to list", 1)


class CheckDataConfig(CommonConfig):
    """``configs/check_data.yaml``."""

    data: DataConfig
    fix: Location | None = path("new or empty folder in which to write a cleaned copy")
    format: str | None = field("format of the cleaned copy; null keeps that of the set", "the name of a format")


class ConvertDataConfig(CommonConfig):
    """``configs/convert_data.yaml``."""

    data: DataConfig
    dst: Location = path("new or empty folder in which to write the converted set")
    format: str = field("format to convert to", "the name of a format")


class ImportWeightsConfig(CommonConfig):
    """``configs/import_weights.yaml``."""

    src: Location = path("checkpoint of another project")
    dst: Location = path("new .safetensors file to write")
    sampling: Literal["paper", "tutorial"] | None = field(
        "sampling grid of the AKConv layers in the file; null for files without any"
    )
    backbone: PartConfig = field(
        "backbone in the file, for a file that holds only a backbone; inferred if not given", default=None
    )
    neck: NeckConfig = field("neck of the model; set by model", default=None)
    head: HeadConfig = field("head of the model; set by model", default=None)
    model: ModelConfig = field("model in the file; inferred from the tensors if not given", default=None)


class BenchmarkConfig(ComposedConfig):
    """``configs/benchmark.yaml``."""

    task: str = field("benchmark to run", "the name of a benchmark")
    data: DataConfig = field("data set for task=data", default=None)
    augment: AugmentConfig
    optim: OptimConfig
    batch_size: BatchSize = _batch_size()
    num_classes: int = whole("number of classes", 1, MAX_CLASSES)
    boxes: int = whole("ground-truth boxes per image", 0, 10_000)
    rounds: int = whole("timed runs of each variant", 1)
    compile: bool = field("also time the compiled training step")
    peer: Location | None = path(
        "path of a Python interpreter with Ultralytics installed, to time that project as well"
    )


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
