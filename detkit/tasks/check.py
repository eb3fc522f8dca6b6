"""Test a combination of parts on this machine: ``detkit check model=yolov8n backbone=revcol_tiny``."""

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from detkit.checks.harness import Composition
from detkit.checks.model_checks import CHECKS, FIGURES, CheckResult, run_check
from detkit.config.common import MAX_CLASSES, ComposedConfig
from detkit.config.fields import whole
from detkit.models.detector import build_detector, build_loss
from detkit.ops.device import pick_device
from detkit.ops.precision import seed_everything
from detkit.tasks.runs.run_dir import model_name
from detkit.viz.console import make_console
from detkit.viz.progress import show_progress


class CheckConfig(ComposedConfig):
    """Keys of ``configs/check.yaml``."""

    num_classes: int = whole("number of classes", 1, MAX_CLASSES)


def run(cfg: CheckConfig) -> list[CheckResult]:
    """Check the detector composed by ``cfg`` (configs/check.yaml, resolved); print and return the results.

    Raises:
        DetkitError: the parts do not fit together.
        SystemExit: with status 1 if a check failed.
    """
    console = make_console()
    device = pick_device(cfg.device)
    seed_everything(cfg.seed)
    detector = build_detector(cfg.as_dict(), [f"class{k}" for k in range(cfg.num_classes)]).to(device)
    composition = Composition(detector, build_loss(cfg.as_dict(), detector.head), cfg.image_size)
    with contextlib.suppress(Exception):  # the checks report errors of the detector
        composition.randomize_norms()
    findings = []
    with show_progress("check", len(CHECKS) + len(FIGURES)) as bar:
        for title, check in (CHECKS | FIGURES).items():
            findings.append(run_check(composition, title, check))
            bar.advance()
    print_check_results(findings[: len(CHECKS)], findings[len(CHECKS) :], console)
    name, failed = model_name(cfg), [finding.title for finding in findings if finding.status == "fail"]
    if failed:
        console.print(f"{name} on {device}: {len(failed)} of {len(findings)} rows failed: {', '.join(failed)}.")
        sys.exit(1)
    console.print(f"{name} on {device}: every check passed.")
    return findings


STYLES = {"pass": "green", "fail": "bold red", "-": "dim"}


def print_check_results(checks: Sequence[CheckResult], figures: Sequence[CheckResult], console: Console) -> None:
    """Print the results of the checks, then the figures; a figure that could not be computed is shown as failed."""
    table = Table(header_style="bold")
    for name in ("check", "", "result"):
        table.add_column(name, overflow="fold")
    for finding in checks:
        table.add_row(finding.title, finding.status, finding.message, style=STYLES[finding.status])
    table.add_section()
    for finding in figures:
        status, style = ("fail", STYLES["fail"]) if finding.status == "fail" else ("", None)
        table.add_row(finding.title, status, finding.message, style=style)
    console.print(table, soft_wrap=False)
