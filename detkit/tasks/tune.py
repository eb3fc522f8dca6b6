"""Search for the best settings with Optuna: ``detkit tune 'search={optim.lr: {low: 1e-4, high: 1e-2}}'``.

A study is a folder. Every process that runs the same command takes trials from it until ``trials`` are done. The values
of a trial depend on the seed, its number and the results so far, but not on the process. A trial whose process was
killed is resumed.
"""

import csv
import io
import json
import logging
import shlex
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig

from detkit.config import flatten, parse_config
from detkit.config.common import TrainConfig, Url
from detkit.config.fields import field, whole
from detkit.config.schema import PrunerConfig
from detkit.data.read import read_training
from detkit.distributed.rendezvous import RankInfo
from detkit.engine.state import TrainState
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from detkit.tasks import train
from detkit.tasks.runs.run_dir import AUTO, model_name
from detkit.tasks.runs.run_lock import lock_file
from detkit.tasks.sweeps.search_space import (
    TUNING,
    as_overrides,
    check_space,
    folder_name,
    read_space,
    suggest,
    trial_config,
)
from detkit.viz.console import make_console
from detkit.viz.tables import print_rows

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from detkit.tasks.sweeps.search_space import Distribution

logger = logging.getLogger(__name__)

FREE = ("trials", "pruner", "storage", "run_dir", "resume", "device", "workers", "data.root", "data.yaml")
MEASURED = ("AP", "AP50", "best_epoch", "epochs")


class TuneConfig(TrainConfig):
    """Keys of ``configs/tune.yaml``."""

    search: Any = field("mapping of keys to the values to try: lists of choices, or ranges {low, high}")
    trials: int = whole("total number of trials in the study", 1)
    pruner: PrunerConfig
    storage: Url | None = field(
        "URL of the study's database; null keeps the study in a file in run_dir", "null, or the URL of a database"
    )


def run(cfg: TuneConfig) -> list[dict[str, Any]]:
    """Run trials of the study specified by ``cfg`` (configs/tune.yaml, resolved); return the rows of ``study.csv``.

    Raises:
        DetkitError: an error that concerns all trials; found before the first.
        SystemExit: with status 1 if no trial was completed; or a signal requested the end.
    """
    _import_optuna()
    if RankInfo.from_env().ranks > 1:
        hint = "start tune once per GPU (device=cuda:N), without torchrun, on SLURM in steps of one task"
        raise DetkitError(f"a trial trains in one process: {hint} (srun --ntasks=1 --gpus=1 --exact ... &)")
    typed = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    space = read_space(cfg.search)
    check_space(space, typed)
    read_training(cfg.data.as_dict())  # a data set with errors would fail every trial

    folder = Path(str(cfg.run_dir or Path("runs") / "tune" / f"{model_name(cfg)}_{cfg.data.name}"))
    study = _open_study(folder, cfg)
    started = len(study.get_trials(deepcopy=False))
    logger.info("study %s: %d of %d trials already started", folder, started, cfg.trials)
    while (taken := _take_trial(study, space, folder, cfg)) is not None:
        trial, chosen, lock = taken
        run_dir = str(folder / folder_name(trial.number, chosen))
        trial.set_user_attr("folder", run_dir)
        logger.info("trial %d: %s", trial.number, " ".join(as_overrides(chosen)))
        _run_trial(study, trial, typed, chosen, run_dir)
        if lock is not None:
            lock.release()
        _write_table(study, folder)
    rows = _write_table(study, folder)
    _log_result(study, rows, typed, folder)
    return rows


def _run_trial(
    study: "Study",
    trial: "Trial",
    typed: Sequence[str],
    chosen: Mapping[str, Any],
    run_dir: str,
) -> None:
    """Train with the ``chosen`` values in ``run_dir`` and report the result, or the error, to the study."""
    from optuna.trial import TrialState

    reported = set(study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def prune(state: TrainState) -> str | None:
        for row in state.history:
            epoch = int(row["epoch"])
            if epoch not in reported:
                trial.report(row["AP"], epoch)
                reported.add(epoch)
        return "Optuna prunes this trial" if state.history and trial.should_prune() else None

    try:
        cfg = parse_config(trial_config(typed, chosen) | {"run_dir": str(run_dir), "resume": AUTO}, TrainConfig)
        results = train.run(cfg, prune)
    except DetkitError as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        best, epochs = results["best"], results["last"]["epoch"]
        for name, value in zip(MEASURED, (best["AP"], best["AP50"], best["epoch"], epochs), strict=True):
            trial.set_user_attr(name, value)
        pruned = epochs < cfg.trainer.epochs and trial.should_prune()
        study.tell(trial, **({"state": TrialState.PRUNED} if pruned else {"values": best["AP"]}))
        return
    logger.warning("trial %d failed: %s", trial.number, reason)
    trial.set_user_attr("error", reason)
    study.tell(trial, state=TrialState.FAIL)


def _take_trial(
    study: "Study", space: Mapping[str, "Distribution"], folder: Path, cfg: TuneConfig
) -> tuple["Trial", dict[str, Any], FileLock | None] | None:
    """Return the next trial, its values, and a lock that marks it as running while this process lives.

    It is a trial whose process died, or else a new one; None if there are enough.
    """
    from optuna import Trial
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    locks = folder / ".running"
    locks.mkdir(parents=True, exist_ok=True)
    study_lock = lock_file(folder / ".lock", wait=True)
    try:
        trials = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        seed = np.random.SeedSequence([cfg.seed, len(trials)]).generate_state(1)[0]
        study.sampler = TPESampler(seed=int(seed), constant_liar=True)
        for started in trials:
            path = locks / str(started.number)  # missing for trials on another machine's disk
            if started.state == TrialState.RUNNING and path.exists() and (lock := lock_file(path)) is not None:
                trial = Trial(study, started._trial_id)
                return trial, suggest(trial, space), lock
        if len(trials) >= cfg.trials:
            return None
        trial = study.ask()
        lock = lock_file(locks / str(trial.number))
        return trial, suggest(trial, space), lock
    finally:
        if study_lock is not None:
            study_lock.release()


def _open_study(folder: Path, cfg: TuneConfig) -> "Study":
    """Load the study in ``folder``, or create it.

    Raises:
        DetkitError: the folder or the storage cannot be used, or the study was created with other settings.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    settings = {
        key: value for key, value in flatten(cfg.as_dict()).items() if key not in FREE and not key.startswith("pruner.")
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        storage: str | BaseStorage | None = cfg.storage
        if storage is None:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.journal")))
        study = optuna.create_study(
            storage=storage,
            study_name=folder.name,
            direction="maximize",
            pruner=_pruner(cfg),
            load_if_exists=True,
        )
    except OSError as error:
        raise DetkitError(f"run_dir={folder}: {error.strerror}") from None
    except Exception as error:  # anything that a database driver may raise
        hidden = f"{type(error).__name__}: {error}".partition("\n")[0].replace(str(cfg.storage), "the database")
        raise DetkitError(f"storage cannot be opened: {hidden}") from None
    earlier = study.user_attrs.get("settings")
    if earlier is None:
        study.set_user_attr("settings", settings)
        return study
    now = json.loads(json.dumps(settings))
    for key in [*earlier, *now]:
        if earlier.get(key) != now.get(key):
            raise DetkitError(
                f"{folder} holds a study with {key}={earlier.get(key)}, not {now.get(key)}: use another run_dir"
            )
    return study


def _pruner(cfg: TuneConfig) -> "BasePruner":
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    pruner, epochs = cfg.pruner, cfg.trainer.epochs
    if pruner.name == "median":
        return MedianPruner(pruner.startup_trials, pruner.warmup_epochs)
    if pruner.name == "hyperband":
        return HyperbandPruner(min(max(pruner.warmup_epochs, 1), epochs), epochs)
    return NopPruner()


def _write_table(study: "Study", folder: Path) -> list[dict[str, Any]]:
    """Write ``study.csv``, one row per trial; return the rows."""
    rows = [_row(trial) for trial in study.get_trials(deepcopy=False)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    lock = lock_file(folder / ".lock", wait=True)
    write_atomically(folder / "study.csv", text.getvalue().encode())
    if lock is not None:
        lock.release()
    return rows


def _row(trial: "FrozenTrial") -> dict[str, Any]:
    measured = {name: trial.user_attrs.get(name) for name in MEASURED}
    rest = {"error": trial.user_attrs.get("error"), "folder": trial.user_attrs.get("folder")}
    return {"trial": trial.number, "state": trial.state.name.lower(), **measured, **trial.params, **rest}


def _log_result(study: "Study", rows: list[dict[str, Any]], typed: list[str], folder: Path) -> None:
    """Print the table, failures, best trial and its training command; exit with status 1 if no trial is complete."""
    chosen = {t.number: {"chosen": " ".join(as_overrides(t.params))} for t in study.get_trials(deepcopy=False)}
    print_rows([row | chosen[row["trial"]] for row in rows], ("trial", "state", *MEASURED, "chosen"), make_console())
    for row in rows:
        if row["error"]:
            logger.warning("trial %d failed: %s", row["trial"], row["error"])
    logger.info("%s", folder / "study.csv")
    complete = [row for row in rows if row["state"] == "complete"]
    if not complete:
        logger.info("no trial was completed")
        raise SystemExit(1)
    best = study.best_trial
    logger.info("best: trial %d, AP %.4f: %s", best.number, best.value, best.user_attrs["folder"])
    overrides = [o for o in typed if o.lstrip("+").partition("=")[0].partition(".")[0] not in (*TUNING, "run_dir")]
    logger.info("python tools/train.py %s", shlex.join([*overrides, *as_overrides(best.params)]))


def _import_optuna() -> None:
    try:
        import optuna
    except ImportError:
        raise DetkitError("tune needs Optuna, which is not installed: pip install 'detkit[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
