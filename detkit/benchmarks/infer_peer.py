"""The peer's side of ``task=infer``: Ultralytics, by its public interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from detkit.benchmarks.common import BenchmarkConfig
from detkit.benchmarks.peer import Ask, start_peer

# Arguments: folder of images, model, image size, device, threads (0: as it sets them itself), images, points, classes
# and candidates of the batch for postprocessing. Turns: a batch size, "folder" and "nms".
PEER = """
import itertools, json, os, pathlib, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # other output must not be taken for an answer
import torch
from ultralytics import YOLO
try:
    from ultralytics.utils.nms import non_max_suppression
except ImportError:
    from ultralytics.utils.ops import non_max_suppression
folder, name, side, device, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
images, points, classes, candidates = map(int, sys.argv[6:10])
paths = itertools.cycle(sorted(str(path) for path in pathlib.Path(folder).iterdir()))
options = dict(imgsz=side, device=device, conf=0.25, iou=0.7, max_det=300, rect=False, verbose=False)
model = YOLO(name + ".yaml")
model.predict(next(paths), **options)
if threads:  # it has set its own number by now
    torch.set_num_threads(threads)
def make_batch():
    corner = torch.rand(images, points, 2) * side * 0.9
    boxes = torch.cat((corner, 8 + torch.rand(images, points, 2) * side / 3), -1)  # centre and size
    scores = torch.rand(images, points * classes) * 0.0009
    for row in scores:
        row[torch.randperm(len(row))[:candidates]] = 0.002 + torch.rand(candidates) ** 3 * 0.9
    return torch.cat((boxes, scores.view(images, points, classes)), -1).transpose(1, 2).contiguous()
def predict(batch):
    chosen = [next(paths) for _ in range(batch)]
    start = time.perf_counter()
    results = model.predict(chosen, batch=batch, **options)
    seconds = time.perf_counter() - start
    speed = {key: sum(r.speed[key] for r in results) / 1000 for key in ("preprocess", "inference", "postprocess")}
    return {"predict": seconds, "network": speed.pop("inference"), **speed}
def save_folder():
    start = time.perf_counter()
    count = sum(1 for _ in model.predict(folder, save=True, project=os.getcwd(), name="x", exist_ok=True, stream=True,
                                         **options))
    return {"folder": (time.perf_counter() - start) / count}
def suppress():
    batch = nms_batch.clone()
    start = time.perf_counter()
    non_max_suppression(batch, conf_thres=0.001, iou_thres=0.7, max_det=300, multi_label=True)
    return {"nms": time.perf_counter() - start}
torch.manual_seed(0)
nms_batch = make_batch()
print("0", file=answers, flush=True)
turns = {"folder": save_folder, "nms": suppress}
for line in map(str.strip, sys.stdin):
    answer = turns[line]() if line in turns else predict(int(line))
    print(json.dumps(answer), file=answers, flush=True)
"""


@contextmanager
def start_infer_peer(
    cfg: BenchmarkConfig, folder: Path, device: torch.device, threads: int, batch: tuple[int, ...]
) -> Iterator[Ask]:
    """Start the peer's prediction; yield a function that asks for a turn, see ``Turns``.

    Args:
        cfg: has the model's name, the image size, and the peer's Python.
        folder: images to predict.
        device: to compute on.
        threads: 0 leaves the number to the peer.
        batch: images, points, classes and candidates per image of the batch for postprocessing.
    """
    place = "cpu" if device.type == "cpu" else str(device.index or 0)
    arguments = (folder, cfg.model.name, cfg.image_size, place, threads, *batch)
    with start_peer(str(cfg.peer), PEER, arguments) as ask:
        yield ask
