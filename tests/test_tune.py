"""Tuning: what may be searched, and a study that prunes, fails, is killed and resumed."""

import csv
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from detkit.engine.state import TrainState
from detkit.engine.trainer import Trainer
from detkit.errors import DetkitError
from detkit.tasks import train, tune
from detkit.tasks.sweeps.search_space import as_overrides, check_space, folder_name, read_space, trial_config
from tests.conftest import run_command

optuna = pytest.importorskip("optuna")

RANGE = "search={optim.lr: {low: 1e-4, high: 1e-2, log: true}, augment: [none,light]}"


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "study.csv").read_text().splitlines()))


def history(*scores: float) -> TrainState:
    return TrainState(epoch=len(scores), history=[{"epoch": k, "AP": score} for k, score in enumerate(scores, 1)])


def results(ap: float, epochs: int) -> dict:
    return {"best": {"AP": ap, "AP50": 2 * ap, "epoch": 1}, "last": {"epoch": epochs}}


def test_the_space_is_what_is_asked_for():
    choices = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "trainer.epochs": {"low": 2, "high": 8, "step": 2}}
    choices |= {"trainer.multi_scale": {"low": 0, "high": 0.5}, "backbone": ["mobilenetv2", "csp_darknet"]}
    choices |= {"augment.affine.scale": [[0.5, 1.5], [0.8, 1.2]], "optim.layer_decay": [None, 0.75]}
    space = read_space(choices)
    typed = ["model=yolov8n", "search={seed: [1]}"]
    check_space(space, typed)
    assert space["optim.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
    assert space["trainer.epochs"] == optuna.distributions.IntDistribution(2, 8, step=2)
    assert space["trainer.multi_scale"] == optuna.distributions.FloatDistribution(0.0, 0.5)
    assert space["augment.affine.scale"].choices == ("[0.5,1.5]", "[0.8,1.2]")
    chosen = {"optim.lr": 1.5e-05, "backbone": "mobilenetv2", "augment.affine.scale": "[0.8,1.2]"}
    cfg = trial_config(typed, chosen | {"optim.layer_decay": None})
    assert (cfg["optim"]["lr"], cfg["backbone"]["name"], cfg["augment"]["affine"]["scale"]) == (
        1.5e-05,
        "mobilenetv2",
        [0.8, 1.2],
    )
    assert cfg["optim"]["layer_decay"] is None
    assert not {"search", "trials", "pruner", "storage"} & set(cfg)
    assert as_overrides({"rect": True, "optim.layer_decay": None}) == ["rect=true", "optim.layer_decay=null"]
    assert folder_name(7, chosen) == "7_optim.lr-1.5e-05_backbone-mobilenetv2_augment.affine.scale-0.8-1.2"


MISTAKES = [
    ([], "search is not set"),
    (["search={}"], "search must be a mapping of keys to values"),
    (["search={optim.lr: 3}"], "search: optim.lr must be a list of choices, or {low: A, high: B}"),
    (["search={optim.lr: []}"], "search: optim.lr must be a list of choices"),
    (["search={optim.lr: {low: 1, hihg: 2}}"], "search: optim.lr must be a list of choices"),
    (["search={optim.lr: {low: 2, high: 1}}"], "search: optim.lr: "),
    (["search={optim.lrr: [1,2]}"], "there is no key 'optim.lrr'; did you mean 'optim.lr'?"),
    (["search={optim.lr: {low: -1, high: 1}}"], "optim.lr=-1 must be a number above 0"),
    (["search={backbone: [csp_darknet,revcol_tny]}"], "did you mean 'revcol_tiny'?"),
    (["search={trials: [1,2]}"], "search: trials cannot be searched"),
    ([RANGE, "pruner.name=best"], "pruner.name=best must be median, hyperband or none"),
    ([RANGE, "storage=database"], "storage=database must be null, or the URL of a database"),
    ([RANGE, "storage=nosql://me:secret@host/x"], "storage cannot be opened: "),
    ([RANGE, "data=coco", "data.root=/nowhere"], "data.root=/nowhere is not a folder"),
    ([RANGE, "bakbone=csp_darknet"], "did you mean 'backbone'?"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[m[1][:40] for m in MISTAKES])
def test_a_mistake_is_one_message_before_any_trial(arguments, message, monkeypatch, capsys, tmp_path, train_overrides):
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("a trial began"))
    if "data=coco" in arguments:
        train_overrides = train_overrides[1:]
    where = f"run_dir={tmp_path / 'study'}"
    status, _, error = run_command(monkeypatch, capsys, "tune", *train_overrides, where, *arguments)
    assert status == 2
    assert message in error
    assert "secret" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def study(monkeypatch, capsys, tmp_path, train_overrides):
    """Return a function that runs the command with a stub for the training; ``folder`` is the study's."""

    def run(training, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(train, "run", training)
        options = [RANGE, f"run_dir={tmp_path / 'study'}", "pruner.startup_trials=1", "pruner.warmup_epochs=0"]
        return run_command(monkeypatch, capsys, "tune", *train_overrides, *options, *arguments)

    run.folder = tmp_path / "study"
    return run


def test_trials_are_chosen_pruned_and_named(study):
    """The first trial is whole, the second pruned for its AP, the third a mistake, the fourth a fault."""
    seen = []

    def training(cfg, stop_early):
        seen.append(cfg.optim.lr)
        number = len(seen)
        if number == 3:
            raise DetkitError("out of memory: use batch_size=2")
        if number == 4:
            raise RuntimeError("a bug")
        assert cfg.resume == "auto"
        score = 0.5 if number == 1 else 0.1
        for epoch in (1, 2):
            if stop_early(history(*[score] * epoch)):
                return results(score, epoch)
        return results(score, 2)

    status, printed, _ = study(training, "trials=4")
    assert status == 0
    first, second, third, fourth = rows(study.folder)
    assert [row["state"] for row in (first, second, third, fourth)] == ["complete", "pruned", "fail", "fail"]
    assert (first["AP"], first["AP50"], first["epochs"], second["epochs"]) == ("0.5", "1.0", "2", "1")
    assert third["error"] == "out of memory: use batch_size=2"
    assert fourth["error"] == "RuntimeError: a bug"
    assert "trial 2 failed: out of memory" in printed
    assert "best: trial 0, AP 0.5000" in printed
    assert f"optim.lr={first['optim.lr']} augment={first['augment']}" in printed.splitlines()[-1]
    assert "search" not in printed.splitlines()[-1]
    assert Path(first["folder"]).name.startswith("0_optim.lr-")
    assert len(set(seen)) == 4

    again = []
    status, _, error = study(lambda cfg, stop: again.append(cfg) or results(0.6, 2), "trials=5", "seed=1")
    assert (status, again) == (2, [])
    assert "holds a study with seed=0, not 1" in error
    status, printed, _ = study(lambda cfg, stop: again.append(cfg) or results(0.6, 2), "trials=5")
    assert (status, len(again)) == (0, 1)
    assert "best: trial 4, AP 0.6000" in printed


def test_a_study_without_a_whole_trial_fails(study):
    def training(cfg, stop_early):
        raise DetkitError("no")

    status, printed, _ = study(training, "trials=1")
    assert status == 1
    assert "no trial was completed" in printed


def in_child(command: Callable[[], tuple[int, str, str]]) -> int:
    """Run a command in a process of its own; return its exit status, or the negative number of what killed it."""
    pid = os.fork()
    if not pid:
        status = 99
        try:
            GlobalHydra.instance().clear()
            status = command()[0]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.slow
def test_a_killed_trial_is_resumed_and_several_processes_divide_a_study(study):
    """A process is killed in its trial; another takes that up, and a third meanwhile the trial that is left."""

    def killed(cfg, stop_early):
        stop_early(history(0.1))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: study(killed, "trials=2")) == -signal.SIGKILL
    seen = []

    def training(cfg, stop_early):
        seen.append(cfg.run_dir)
        assert in_child(lambda: study(lambda cfg, stop: results(0.2, 2), "trials=2")) == 0
        stop_early(history(0.1, 0.4))
        return results(0.4, 2)

    status, printed, _ = study(training, "trials=2")
    assert status == 0
    assert len(seen) == 1
    table = rows(study.folder)
    assert [(row["trial"], row["AP"]) for row in table] == [("0", "0.4"), ("1", "0.2")]
    assert Path(seen[0]).name.startswith("0_")
    assert "best: trial 0" in printed


@pytest.mark.slow
def test_a_study_of_real_trainings(monkeypatch, capsys, tmp_path, train_overrides):
    """Three trainings; the last, whose AP is below those of the others, is pruned after its first epoch."""
    scores = iter((0.5, 0.6, 0.4, 0.5, 0.1))
    validate = Trainer.validate

    def scored(self):
        evaluation = validate(self)
        evaluation.metrics["AP"] = next(scores)
        return evaluation

    monkeypatch.setattr(Trainer, "validate", scored)
    tiny = ["model.width=0.0625", "amp=off", "pruner.startup_trials=2", "pruner.warmup_epochs=0", "trials=3"]
    where = f"run_dir={tmp_path / 'study'}"
    status, printed, _ = run_command(monkeypatch, capsys, "tune", *train_overrides, *tiny, RANGE, where)
    assert status == 0
    assert "stopped early: Optuna prunes this trial" in printed
    table = rows(tmp_path / "study")
    assert [row["state"] for row in table] == ["complete", "complete", "pruned"]
    assert [row["epochs"] for row in table] == ["2", "2", "1"]
    for row in table:
        assert json.loads((Path(row["folder"]) / "metrics.json").read_text())["best"]["AP"] == float(row["AP"])


def test_optuna_missing_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DetkitError, match=r"pip install 'detkit\[sweeps\]'"):
        tune.run({})


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
    ],
    ids=["torchrun", "srun"],
)
def test_ranks_are_refused(environment, monkeypatch):
    """Else several trials would take each other for ranks of one training."""
    monkeypatch.setattr(os, "environ", os.environ | environment)
    with pytest.raises(DetkitError, match="a trial trains in one process: start tune once per GPU"):
        tune.run({})
