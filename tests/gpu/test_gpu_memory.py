"""A GPU's memory: what fits is found, what does not is reported, RevCol's does not grow with its columns."""

import re

import pytest
import torch

import detkit
from detkit.data.formats import shapes
from detkit.engine.auto_batch import choose_batch_size, make_trial_step
from detkit.errors import DetkitError
from detkit.models.backbones.revcol import STRIDES, RevCol
from detkit.ops.precision import Precision, is_out_of_memory
from detkit.tasks import load_config, train
from tests.gpu.conftest import limited_memory, make_step, noise, peak_bytes

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def larger_set(tmp_path_factory):
    """A drawing of the embedded set with a batch of 64 images in it."""
    root = tmp_path_factory.mktemp("shapes") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 64, "val": 4})
        shapes.read_shapes("train", root=str(root))
    return root


@pytest.mark.parametrize("compiled", [False, True])
def test_running_out_of_memory_names_a_batch_that_fits(compiled, larger_set, cuda, tmp_path):
    arguments = [
        "model=yolov8n",
        f"data.root={larger_set}",
        "image_size=640",
        "workers=2",
        "amp=bf16",
        f"device={cuda}",
    ]
    arguments += ["trainer.epochs=1", "augment=none", f"trainer.compile={compiled}"]
    with limited_memory(cuda, gib=3):
        with pytest.raises(DetkitError, match=r"batch_size=64 does not fit into the memory of cuda") as error:
            train.run(load_config("train", [*arguments, "batch_size=64", f"run_dir={tmp_path / 'first'}"]))
        fits = re.search(r"batch_size=\d+ would fit", str(error.value))[0].split()[0]
        train.run(load_config("train", [*arguments, fits, f"run_dir={tmp_path / 'second'}"]))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_the_batch_that_is_chosen_trains(optimizer, amp, cuda):
    """With little to spare: one twice as large does not, in the same memory."""
    step = make_step("model=yolov8n", cuda, amp, optimizer)
    attempt = make_trial_step(step.detector, step.loss, step.precision, 320)
    with limited_memory(cuda, gib=2):
        size = choose_batch_size(attempt, cuda)
        assert size & (size - 1) == 0
        for k in range(3):
            step(noise(cuda, size, 320), k, 0)
        step.optimizer.zero_grad()
        torch.cuda.empty_cache()
        with pytest.raises(RuntimeError) as error:
            attempt(2 * size)
    assert is_out_of_memory(error.value)
    step.optimizer.zero_grad()


def test_what_never_fits_is_reported(cuda):
    detector = detkit.create_model("yolov8n", num_classes=3).to(cuda)
    loss = make_step("model=yolov8n", cuda, "bf16").loss
    with limited_memory(cuda, gib=0.5), pytest.raises(DetkitError, match="one image fits"):
        choose_batch_size(make_trial_step(detector, loss, Precision.from_config("bf16", cuda), 4096), cuda)


class Graph:
    """A forward pass, and the backward pass that ends it; no gradient is left."""

    def __init__(self, model: RevCol, x: torch.Tensor) -> None:
        self.model, self.x, self.features = model, x, ()

    def forward(self) -> None:
        self.features = self.model(self.x)

    def backward(self) -> None:
        sum(f.mean() for f in self.features).backward()
        self.features = ()
        self.model.zero_grad()


def test_revcol_s_memory_does_not_grow_with_its_columns(cuda, capsys):
    """What a forward pass leaves for backward, and the most that both take beside the gradients, in MiB."""
    settings = {"plain": (False, 0), "keep_every=0": (True, 0), "keep_every=2": (True, 2), "keep_every=4": (True, 4)}
    kept: dict[str, dict[int, float]] = {name: {} for name in settings}
    most: dict[str, dict[int, float]] = {name: {} for name in settings}
    x = torch.rand(4, 3, 256, 256, device=cuda)
    for columns in (4, 8, 16):
        model = RevCol((64, 128, 256, 512), columns=columns, drop_path=0.0, out_strides=STRIDES).to(cuda)
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        for name, (model.save_memory, model.keep_every) in settings.items():
            graph = Graph(model, x)
            for run in (graph.forward, graph.backward):  # what is allocated once
                run()
            if cuda.type != "cuda":
                continue
            before = torch.cuda.memory_allocated(cuda)
            first = peak_bytes(cuda, graph.forward)
            left = torch.cuda.memory_allocated(cuda) - before
            second = left + peak_bytes(cuda, graph.backward) - own
            kept[name][columns], most[name][columns] = left / 2**20, max(first, second) / 2**20
    if cuda.type != "cuda":
        pytest.skip("a CPU's memory is not counted")
    with capsys.disabled():
        print(f"\nRevCol, 256 px, batch 4, kept: {kept}\nat most: {most}")
    assert kept["keep_every=0"][16] < 1.2 * kept["keep_every=0"][4]
    assert kept["keep_every=0"][16] < kept["keep_every=4"][16] < kept["keep_every=2"][16] < kept["plain"][16]
    assert kept["plain"][16] > 3 * kept["plain"][4]
    assert most["keep_every=0"][16] < 0.5 * most["plain"][16]
