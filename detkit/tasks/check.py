"""Check a composition on the machine at hand."""

import contextlib
import sys
from typing import Any

from detkit.engine.composition import Composition
from detkit.engine.logging import show_progress
from detkit.engine.precision import make_deterministic, pick_device
from detkit.engine.properties import CHECKS, FIGURES, Finding, examine
from detkit.models.detector import build_detector, build_loss
from detkit.report.console import make_console
from detkit.report.tables import print_findings
from detkit.tasks.common import model_name


def run(cfg: dict[str, Any]) -> list[Finding]:
    """Check what ``cfg`` (configs/check.yaml, resolved) composes; print a table and one sentence, return the findings.

    Raises:
        DetkitError: parts that do not fit.
        SystemExit: with status 1, where a check failed.
    """
    console = make_console()
    device = pick_device(cfg["device"])
    make_deterministic(cfg["seed"])
    detector = build_detector(cfg, [f"class{k}" for k in range(cfg["num_classes"])]).to(device)
    composition = Composition(detector, build_loss(cfg, detector.head), cfg["image_size"])
    with contextlib.suppress(Exception):  # what is wrong with the detector, the checks will say
        composition.awaken()
    findings = []
    with show_progress("check", len(CHECKS) + len(FIGURES), console) as bar:
        for title, check in (CHECKS | FIGURES).items():
            findings.append(examine(composition, title, check))
            bar.advance()
    print_findings(findings[: len(CHECKS)], findings[len(CHECKS) :], console)
    name, failed = model_name(cfg), [finding.title for finding in findings if finding.status == "fail"]
    if failed:
        console.print(f"{name} on {device}: {len(failed)} of {len(findings)} rows failed: {', '.join(failed)}.")
        sys.exit(1)
    console.print(f"{name} on {device}: every check passed.")
    return findings
