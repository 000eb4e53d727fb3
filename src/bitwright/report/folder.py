"""The directory of a comparison: what it holds, whose it is, and what --restart drops.

`compare.json` is what all methods share; `methods/KEY.json` what is known of each method so far; `artifacts/KEY` the
artifact in work. The rest is written for people. All are written in one step.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.artifact.shards import write_text
from bitwright.errors import RunError
from bitwright.models.checkpoint import read_json
from bitwright.report.page import comparison_page, render
from bitwright.report.tables import to_csv

SHARED_NAME = "compare.json"
FOLDERS = ("methods", "artifacts")
_MADE = ("activations.json", "results.json", "results.csv", "report.html")
# What a run that was killed at its very beginning leaves.
_BEGUN = ("lock", f"{SHARED_NAME}.tmp")


@dataclass(frozen=True)
class Folder:
    """DIR of `bitwright compare --out DIR`."""

    path: Path

    def check(self) -> None:
        """Raises RunError where something else is in the way."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; give another --out")
        if self.path.is_dir() and not (self.path / SHARED_NAME).exists():
            found = sorted(path.name for path in self.path.iterdir() if path.name not in _BEGUN)
            if found:
                raise RunError(f"{self.path} is no comparison and holds {found[0]}; give another --out")

    def open(self, shared: dict[str, Any], restart: bool) -> dict[str, Any]:
        """Begin, or go on; returns what the methods share as it was when the comparison began.

        Raises RunError where the directory holds a comparison of something else.
        """
        path = self.path / SHARED_NAME
        if restart and path.exists():
            self._drop()
        began = shared
        if path.exists() and not restart:
            began = read_json(path, RunError)
            before, now = _identity(began), _identity(shared)
            differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            if differing:
                raise RunError(
                    f"{self.path} holds a comparison that differs in {', '.join(differing)};"
                    " give another --out, or add --restart to drop it"
                )
        else:
            write_text(path, json.dumps(shared, indent=1))
        for folder in FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        return began

    def _drop(self) -> None:
        """Remove everything but compare.json, which says whose directory this is until it is written anew."""
        for name in _MADE:
            (self.path / name).unlink(missing_ok=True)
        for folder in FOLDERS:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path / folder)

    def artifact(self, key: str) -> Path:
        return self.path / "artifacts" / key

    def drop_artifact(self, key: str) -> None:
        shutil.rmtree(self.artifact(key), ignore_errors=True)
        self.artifact(f"{key}.log.jsonl").unlink(missing_ok=True)

    def record(self, key: str) -> dict[str, Any]:
        """What is known of a method: its `texts` as measured, `seconds` of quantizing, why it `failed` if it did."""
        path = self._record(key)
        return read_json(path, RunError) if path.exists() else {"texts": {}, "seconds": 0.0}

    def save(self, key: str, record: dict[str, Any]) -> None:
        write_text(self._record(key), json.dumps(record, indent=1))

    def _record(self, key: str) -> Path:
        return self.path / "methods" / f"{key}.json"

    def publish(self, results: dict[str, Any]) -> None:
        """Write results.json and results.csv."""
        # JSON has no infinity; the loss beside it is finite.
        write_text(self.path / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
        write_text(self.path / "results.csv", to_csv(results))

    def draw(self, results: dict[str, Any]) -> None:
        """Write report.html: a second or two for ten methods."""
        write_text(self.path / "report.html", render(comparison_page(results)))


def _identity(shared: dict[str, Any]) -> dict[str, Any]:
    """What makes two comparisons the same: a calibration text is its content, whatever its file is called."""
    calibration = shared.get("calibration")
    return shared | {"calibration": calibration.get("sha256") if isinstance(calibration, dict) else None}
