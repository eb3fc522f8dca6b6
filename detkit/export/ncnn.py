"""ncnn: a .param and a .bin file, converted by pnnx."""

import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.graph import ExportGraph
from detkit.export.metadata import Metadata, parse_metadata, read_beside
from detkit.export.packages import need, require_cpu
from detkit.export.settings import ExportSettings, explain_failure
from detkit.ops.files import open_regular

EXTRA = "ncnn"
TIMEOUT = 1800  # seconds for pnnx


def write_ncnn(settings: ExportSettings, path: Path) -> None:
    """Export a detector to ``model.param``, ``model.bin`` and ``model.json`` (its metadata) in the new folder ``path``.

    The input has one fixed size, with a batch of 1. float16 is the precision of the stored weights.

    Raises:
        DetkitError: a package is missing, or the detector cannot be exported.
        OSError: a file cannot be written.
    """
    pnnx = need("pnnx", EXTRA)
    graph = ExportGraph(settings.detector).eval()
    example = settings.example()
    half = settings.metadata.precision == "float16"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                torch.jit.trace(graph, example, check_trace=False).save(f"{folder}/model.pt")  # what pnnx reads
        except Exception as error:  # whatever a tracer may raise
            raise explain_failure(error, settings.detector, "ncnn") from error
        shape = ",".join(map(str, example.shape))
        command = [pnnx.EXEC_PATH, "model.pt", f"inputshape=[{shape}]", f"fp16={int(half)}"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise DetkitError(f"pnnx did not convert this model to ncnn within {TIMEOUT} seconds") from None
        produced = Path(folder) / "model.ncnn.param"
        if done.returncode or not produced.exists():
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise DetkitError(f"pnnx cannot convert this model to ncnn: {shorten(' '.join(last)) or 'it crashed'}")
        path.mkdir()
        produced.replace(path / "model.param")
        produced.with_suffix(".bin").replace(path / "model.bin")
    (path / "model.json").write_text(settings.metadata.to_json(), encoding="utf-8")


class NcnnRunner:
    """Runs an ncnn network."""

    def __init__(self, package: Any, net: Any, metadata: Metadata) -> None:
        self.package = package
        self.net = net
        self.metadata = metadata

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (1, 3, H, W) float32 in 0..1 to boxes (1, A, 4) and scores (1, A, C)."""
        array = np.ascontiguousarray(images[0].cpu().numpy())
        with self.net.create_extractor() as extractor:
            extractor.input("in0", self.package.Mat(array).clone())
            outputs = [extractor.extract(name) for name in ("out0", "out1")]
            if any(status for status, _ in outputs):
                raise DetkitError("ncnn could not run the model: an operator failed")
            boxes, scores = (torch.from_numpy(np.array(mat)) for _, mat in outputs)
        classes = len(self.metadata.class_names)
        return boxes.reshape(1, -1, 4), scores.reshape(1, -1, classes)


def open_ncnn(path: Path, device: torch.device, _amp: str, _raw: bool) -> NcnnRunner:
    """Open a .param file with its .bin and .json files beside it.

    Raises:
        DetkitError: the package is missing, or a file is damaged or missing.
    """
    package = need("ncnn", EXTRA)
    require_cpu(device, "ncnn")
    metadata = parse_metadata(read_beside(path), path)
    for file in (path, path.with_suffix(".bin")):
        open_regular(file).close()
    net = package.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = torch.get_num_threads()
    if metadata.precision == "float32":
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise DetkitError(f"{path} is not a readable ncnn model")
    return NcnnRunner(package, net, metadata)
