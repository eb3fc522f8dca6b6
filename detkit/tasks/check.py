"""Check a composition on the machine at hand."""

import contextlib
import sys
from typing import Any

from detkit.engine.composition import CHECKS, FIGURES, Composition, Finding, awaken, examine
from detkit.engine.logging import show_progress
from detkit.engine.precision import make_deterministic, pick_device
from detkit.models.detector import build_detector
from detkit.registry import LOSSES
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
    detector = build_detector(cfg, [str(k) for k in range(cfg["num_classes"])]).to(device)
    composition = Composition(detector, LOSSES.build(cfg["loss"]).to(device), cfg["image_size"])
    with contextlib.suppress(Exception):  # what is wrong with the detector, the checks will say
        awaken(composition)
    findings = []
    with show_progress("check", len(CHECKS) + len(FIGURES), console) as bar:
        for title, check in (*CHECKS, *FIGURES):
            findings.append(examine(composition, title, check))
            bar.advance()
    print_findings(findings[: len(CHECKS)], findings[len(CHECKS) :], console)
    failed = [finding.title for finding in findings if finding.status == "fail"]
    if failed:
        console.print(f"{model_name(cfg)} on {device}: {len(failed)} of {len(findings)} failed: {', '.join(failed)}.")
        sys.exit(1)
    console.print(f"{model_name(cfg)} on {device}: every check passed.")
    return findings
