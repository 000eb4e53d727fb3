"""bitwright doctor: what this machine has, what was chosen, and whether it computes what it should."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import typer

from bitwright import __version__
from bitwright.cli import console, options


def command(as_json: options.AsJson = False) -> None:
    """Show the kernels that were found and chosen, and test each against its scalar twin. Exit code 1 if one fails."""
    import torch
    import transformers

    from bitwright.native import REFERENCE, VARIABLE, missing, native
    from bitwright.runtime.selftest import self_test, variants

    module: Any = native()
    found = variants()
    checks = self_test()
    failed = [check for check in checks if not check.passed]
    report = {
        "bitwright": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "variants": [{"name": name, "runs_here": runs} for name, runs in found],
        "chosen": module.chosen() if module is not None else REFERENCE,
        "override": os.environ.get(VARIABLE) or None,
        "checks": [{**vars(check), "passed": check.passed} for check in checks],
        "ok": bool(found) and not failed,
    }
    if as_json:
        print(json.dumps(report))
    else:
        _print(report, missing() if not found else None)
    if failed:
        raise typer.Exit(1)


def _print(report: dict[str, Any], problem: str | None) -> None:
    out = console.out
    out.print(
        f"bitwright {report['bitwright']}, Python {report['python']}, torch {report['torch']},"
        f" transformers {report['transformers']}, {report['machine']}, {report['threads']} threads"
    )
    for variant in report["variants"]:
        mark = "chosen" if variant["name"] == report["chosen"] else "runs" if variant["runs_here"] else "not here"
        out.print(f"  {variant['name']:<16} {mark}")
    if report["chosen"] == "reference":
        out.print("  reference        chosen")
    if report["override"]:
        out.print(f"  BITWRIGHT_ISA={report['override']}")
    if problem:
        out.print(problem, markup=False, soft_wrap=True)
    for check in report["checks"]:
        word = "equal to" if check["difference"] == 0 else f"within {check['difference']:.1e} of"
        verdict = f"{word} the scalar twin" if check["passed"] else f"WRONG: {check['difference']:.1e} off"
        out.print(f"  {check['op']:<24} {check['variant']:<16} {verdict}")
