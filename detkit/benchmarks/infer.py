"""Benchmark of prediction, from image files to detections, compared to a peer in the same run."""

import itertools
import logging
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from detkit.benchmarks.common import WARMUP, BenchmarkConfig, describe, print_result
from detkit.benchmarks.exported import export_forms
from detkit.benchmarks.infer_peer import start_infer_peer
from detkit.benchmarks.infer_turns import Variant, make_detector, serve_turns
from detkit.benchmarks.peer import Ask, peer_threads
from detkit.benchmarks.process import start_process
from detkit.data.read import read_split
from detkit.export.formats import find_format
from detkit.inference.views import ViewSettings, make_views
from detkit.ops.device import pick_device
from detkit.ops.image import read_bytes, read_image
from detkit.ops.precision import Precision

logger = logging.getLogger(__name__)

IMAGES = 32  # of the data set's val split, at most
CALIBRATION = 16  # images of int8
CANDIDATES = (16, 8400, 80, 3000)  # images, points, classes, and candidates per image of the batch for NMS
STAGES = ("preprocess", "network", "postprocess")
Seconds = dict[str, dict[str, dict[str, float]]]  # variant -> turn -> what is measured


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Time prediction with every form of a model; print a table and one line of JSON, milliseconds per image.

    Every form has its own process; they alternate, so that load on the machine affects all equally, and the medians
    are reported. Turns are one image, ``batch_size`` images, and for the form that ``predict`` uses and the peers a
    folder with decoding, drawing and writing, and NMS of a validation batch (CANDIDATES).

    Forms: the network as trained in contiguous float32 (``float32``); deployed (``fused``); in channels-last memory
    (``channels-last``); in the precision of ``amp=auto`` (``half``), as ``predict`` runs it; with ``compile=true``
    compiled; exported to ONNX Runtime (float32) and OpenVINO (the precision it chooses, and int8), if these are
    installed. ``ckpt`` is measured instead of a new model; an exported file alone, in its runtime.

    ``peer`` is a Python with ultralytics: a new model of the same name, by its ``predict``, once as it runs and once
    with as many threads as detkit. Both sides read the same files, letterbox them to the same square (``rect`` is off),
    and keep detections above 0.25 with an IoU threshold of 0.7. A peer's stages are those it reports itself; reading
    files is not among them, while it is part of detkit's ``preprocess``. Unless ``ckpt`` is trained, there are few
    detections to draw on either side.

    Raises:
        DetkitError: the data set cannot be read, a form cannot run, or the peer fails.
    """
    device = pick_device(cfg.device)
    with tempfile.TemporaryDirectory(prefix="detkit-infer-") as scratch, ExitStack() as stack:
        folder, exported = Path(scratch) / "images", Path(scratch) / "exported"
        count = _copy_images(cfg, folder)
        exported.mkdir()
        variants = _variants(cfg, device, folder, exported)
        default = next((v.name for v in variants if v.name == "half"), variants[-1].name)
        asks: dict[str, Ask] = {}
        for variant in variants:
            arguments = (cfg, variant, folder, CANDIDATES)
            asks[variant.name], _ = stack.enter_context(start_process(variant.name, serve_turns, *arguments))
        peers = peer_threads(cfg.peer)
        for name, threads in peers.items():
            asks[name] = stack.enter_context(start_infer_peer(cfg, folder, device, threads, CANDIDATES))
        seconds = _in_turns(asks, (default, *peers), cfg)
    result = {
        "task": "infer",
        "model": cfg.model.name if cfg.ckpt is None else str(cfg.ckpt),
        **describe(device),
        "threads": torch.get_num_threads(),
        "image_size": cfg.image_size,
        "batch_size": cfg.batch_size,
        "images": count,
        "default": default,
        **_summarize(seconds, default, cfg.batch_size),
    }
    return print_result(_table(result, cfg.batch_size), result)


def _copy_images(cfg: BenchmarkConfig, folder: Path) -> int:
    """Copy the first images of the val split, by default of the drawn shapes, to a new folder; return their number."""
    data = {"name": "shapes"} if cfg.data is None else cfg.data.as_dict()
    paths = list(itertools.islice(read_split(data, "val").paths, IMAGES))
    folder.mkdir()
    for k, path in enumerate(paths):
        (folder / f"{k:03}{Path(path).suffix}").write_bytes(read_bytes(Path(path)).tobytes())
    return len(paths)


def _variants(cfg: BenchmarkConfig, device: torch.device, folder: Path, exported: Path) -> list[Variant]:
    """Return the forms to measure; the exported ones are written first."""
    if cfg.ckpt is not None and find_format(Path(str(cfg.ckpt))) is not None:
        return [Variant("exported", amp="auto", file=Path(str(cfg.ckpt)))]
    variants = [
        Variant("float32", fused=False, channels_last=False),
        Variant("fused", channels_last=False),
        Variant("channels-last"),
    ]
    fastest = "off" if Precision.from_config("auto", device).dtype is None else "auto"
    if fastest == "auto":
        variants.append(Variant("half", amp="auto"))
    if cfg.compile:
        variants.append(Variant("compiled", amp=fastest, compiled=True))
    if device.type == "cpu" and cfg.exports:
        detector = make_detector(cfg)
        view = ViewSettings(cfg.image_size, detector.max_stride)
        images = [make_views(read_image(path), view)[0].pixels for path in sorted(folder.iterdir())[:CALIBRATION]]
        files = export_forms(detector, cfg.image_size, images, exported)
        variants += [Variant(form.name, amp=form.amp, file=file) for form, file in files.items()]
    return variants


def _in_turns(asks: Mapping[str, Ask], complete: tuple[str, ...], cfg: BenchmarkConfig) -> Seconds:
    """Return the median seconds of everything measured; ``complete`` are those that also predict a folder and so on."""
    turns = list(dict.fromkeys(("1", str(cfg.batch_size))))
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for k in range(WARMUP + cfg.rounds):
        for turn in (*turns, "nms", "folder"):
            for name, ask in asks.items():
                if turn in turns or name in complete:
                    answer = ask(turn)
                    if k >= WARMUP:
                        found.setdefault((name, turn), []).append(answer)
    seconds: Seconds = {}
    for (name, turn), answers in found.items():
        medians = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
        seconds.setdefault(name, {})[turn] = medians
    return seconds


def _summarize(seconds: Seconds, default: str, batch_size: int) -> dict[str, Any]:
    """Return the results by name: milliseconds, images per second, and ratios to the peers."""
    by_image = {
        name: {
            turn: {key: 1000 * value / int(turn) for key, value in found.items()}
            for turn, found in turns.items()
            if turn.isdigit()
        }
        for name, turns in seconds.items()
    }
    ms = by_image[default]["1"] | {
        (f"{name}_predict" if name.startswith("peer") else name): found["1"]["predict"]
        for name, found in by_image.items()
    }
    result: dict[str, Any] = {"ms": ms, "variants": by_image}
    result["images_per_s"] = {
        name: {turn: 1000 / found["predict"] for turn, found in turns.items()} for name, turns in by_image.items()
    }
    result["folder_images_per_s"] = {
        n: 1 / turns["folder"]["folder"] for n, turns in seconds.items() if "folder" in turns
    }
    result["nms_ms"] = {n: 1000 * turns["nms"]["nms"] for n, turns in seconds.items() if "nms" in turns}
    for peer in (name for name in seconds if name.startswith("peer")):
        theirs = by_image[peer]
        result[f"ratio_to_{peer}"] = {
            **{name: found["1"]["predict"] / theirs["1"]["predict"] for name, found in by_image.items()},
            "batch": by_image[default][str(batch_size)]["predict"] / theirs[str(batch_size)]["predict"],
            "folder": result["folder_images_per_s"][peer] / result["folder_images_per_s"][default],
            "nms": result["nms_ms"][default] / result["nms_ms"][peer],
        }
    return result


def _table(result: Mapping[str, Any], batch_size: int) -> Table:
    columns = ("preprocess", "network", "postprocess", "predict", "images/s", f"images/s, batch {batch_size}")
    table = Table("ms per image", *columns, "folder images/s", "NMS of a batch, ms", header_style="bold")
    for name, turns in result["variants"].items():
        stages = [f"{turns['1'][key]:.1f}" if key in turns["1"] else "" for key in (*STAGES, "predict")]
        speeds = [f"{result['images_per_s'][name][turn]:.1f}" for turn in ("1", str(batch_size))]
        rest = [f"{result[key][name]:.1f}" if name in result[key] else "" for key in ("folder_images_per_s", "nms_ms")]
        table.add_row(name, *stages, *speeds, *rest)
    return table
