"""A comparison carried out: each method quantized and measured, one after the other, and nothing done twice.

The output directory holds `compare.json`, what all methods share; `methods/KEY.json`, what is known of each method so
far; `artifacts/KEY`, the artifact in work, removed once it is measured unless it is to be kept, by this call or an
earlier one. All are written in one step, and a run of `quantize` resumes by itself, so that the same command after a
kill goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import bitwright
from bitwright.artifact.shards import TORCH_DTYPES, write_text
from bitwright.calibration import Text, consecutive_windows, load_tokenizer, tokenize
from bitwright.errors import ModelError, RecipeError, RunError
from bitwright.evaluation import check_dtype, evaluate, window_for
from bitwright.models import Checkpoint, Skeleton, context_length
from bitwright.models.checkpoint import read_json
from bitwright.pipeline import quantize
from bitwright.pipeline.plan import Plan, plan_for
from bitwright.pipeline.run import Reporter, Silent
from bitwright.pipeline.state import exclusive
from bitwright.recipe import preset
from bitwright.report import activations
from bitwright.report.grid import Method
from bitwright.report.page import comparison_page, render
from bitwright.report.tables import to_csv

SHARED_NAME = "compare.json"
FOLDERS = ("methods", "artifacts")
# What a run that was killed at its very beginning leaves.
_BEGUN = ("lock", f"{SHARED_NAME}.tmp")
# Fits every model: for sizes that do not depend on the recipe.
_PLAIN = preset("rtn").with_options({"weights.outliers": 0, "weights.order": "none"})


def narrowest(model: str | Path) -> int:
    """Inputs of the narrowest linear of the model's blocks."""
    return min(layer.spec.columns for layer in plan_for(Skeleton(Checkpoint(model)), _PLAIN).layers)


@dataclass(frozen=True)
class Measuring:
    """How the models are measured: the arguments of `bitwright.evaluate`."""

    texts: Sequence[Text]
    window: int | None = None
    limit: int | None = None
    dtype: str = "float32"
    threads: int | None = None

    def key(self, text: Text) -> str:
        """Equal for equal measurements alone; the number of threads does not matter."""
        return f"{text.sha256[:16]} window {self.window} limit {self.limit} {self.dtype}"


class _Clock:
    """Passes on what a run reports, and after each block records the seconds that led to what is on disk."""

    def __init__(self, behind: Reporter, save: Callable[[float], None]) -> None:
        self._behind, self._save, self._since = behind, save, time.monotonic()

    def allocating(self, fraction: float) -> None:
        self.lap()
        self._behind.allocating(fraction)

    def begin(self, plan: Plan, completed: int) -> None:
        self._behind.begin(plan, completed)

    def advance(self, fraction: float) -> None:
        self._behind.advance(fraction)

    def searching(self, target: str, done: float, total: int, found: dict[str, Any] | None) -> None:
        if found:
            self.lap()
        self._behind.searching(target, done, total, found)

    def note(self, message: str) -> None:
        self._behind.note(message)

    def lap(self) -> None:
        now = time.monotonic()
        self._save(now - self._since)
        self._since = now

    def block_done(self, index: int, entries: list[dict[str, Any]]) -> None:
        self.lap()
        self._behind.block_done(index, entries)

    def begin_tuning(self, intervals: int, completed: int) -> None:
        self._behind.begin_tuning(intervals, completed)

    def interval_done(self, number: int, intervals: int, losses: list[float]) -> None:
        self.lap()
        self._behind.interval_done(number, intervals, losses)


class Comparison:
    """One call of `bitwright compare`. Everything that can be refused is refused here, before any work."""

    def __init__(
        self,
        model: str | Path,
        output: str | Path,
        methods: Sequence[Method],
        calibration: Text,
        measuring: Measuring,
        *,
        titles: Sequence[str] = (),
        skipped: Sequence[str] = (),
        skip_unfit: bool = False,
        keep_artifacts: bool = False,
        restart: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self.output = Path(output).absolute()
        self.calibration, self.measuring, self.titles = calibration, measuring, titles
        self.skipped, self.skip_unfit = list(skipped), skip_unfit
        self.keep, self.restart, self.reporter = keep_artifacts, restart, reporter or Silent()
        self.checkpoint = Checkpoint(model)
        skeleton = Skeleton(self.checkpoint)
        self.methods = [method for method in methods if self._fits(skeleton, method)]
        if not self.methods:
            raise RecipeError("no method is left to compare; name at least one, for example bwa")
        self.sizes = plan_for(skeleton, _PLAIN)
        check_dtype(measuring.dtype)
        config = skeleton.config.get_text_config(decoder=True)
        window = window_for(context_length(config), measuring.window)
        tokenizer = load_tokenizer(self.checkpoint.directory)
        for text in measuring.texts:
            consecutive_windows(tokenize(tokenizer, text, config.vocab_size), window, measuring.limit, text)

    def _fits(self, skeleton: Skeleton, method: Method) -> bool:
        """Whether a method can be planned for the model; raises what says why not, or leaves it out where asked to."""
        try:
            if method.recipe is not None:
                plan_for(skeleton, method.recipe, 0, self.measuring.threads)
        except (RecipeError, ModelError) as error:
            if not self.skip_unfit:
                raise type(error)(f"method {method.text!r}: {error}; --skip-unknown goes on without") from None
            self.skipped.append(method.label)
            self.reporter.note(f"method {method.text!r} is left out: {error}")
            return False
        return True

    def carry_out(self) -> dict[str, Any]:
        """Do what is not done yet; write results.json, results.csv and report.html; returns the data of the first."""
        if self.output.exists() and not self.output.is_dir():
            raise RunError(f"{self.output} is a file; give another --out")
        if self.output.is_dir() and not (self.output / SHARED_NAME).exists():
            found = sorted(path.name for path in self.output.iterdir() if path.name not in _BEGUN)
            if found:
                raise RunError(f"{self.output} is no comparison and holds {found[0]}; give another --out")
        with exclusive(self.output):
            self._open()
            measured = self._activations()
            rows = []
            for number, method in enumerate(self.methods, 1):
                self.reporter.note(f"method {number} of {len(self.methods)}: {method.label}")
                rows.append(self._row(method, self._finish(method, measured)))
            results = self._results(rows, measured)
            # JSON has no infinity; the loss beside it is finite.
            write_text(self.output / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
            write_text(self.output / "results.csv", to_csv(results))
            write_text(self.output / "report.html", render(comparison_page(results)))
            return results

    def _shared(self) -> dict[str, Any]:
        """What a method's result depends on beside its recipe and the text that it is measured on."""
        return {
            "bitwright": bitwright.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "model": {"name": self.sizes.model, "files": self.checkpoint.digests()},
            "calibration": {"name": self.calibration.name, "sha256": self.calibration.sha256},
        }

    def _open(self) -> None:
        path, shared = self.output / SHARED_NAME, self._shared()
        if self.restart and path.exists():
            (self.output / "activations.json").unlink(missing_ok=True)
            for folder in FOLDERS:
                shutil.rmtree(self.output / folder, ignore_errors=True)
            write_text(path, json.dumps(shared, indent=1))
        elif path.exists():
            before = read_json(path, RunError)
            differing = sorted(key for key in {*before, *shared} if before.get(key) != shared.get(key))
            if differing:
                raise RunError(
                    f"{self.output} holds a comparison that differs in {', '.join(differing)};"
                    " give another --out, or add --restart to drop it"
                )
        else:
            write_text(path, json.dumps(shared, indent=1))
        for folder in FOLDERS:
            (self.output / folder).mkdir(exist_ok=True)

    def _activations(self) -> dict[str, Any]:
        path = self.output / "activations.json"
        if not path.exists():
            self.reporter.note("measuring the inputs of the original model's sites")
            measured = activations.site_maxima(self.checkpoint.directory, self.calibration, self.measuring.threads)
            write_text(path, json.dumps(measured))
        return read_json(path, RunError)

    def _finish(self, method: Method, measured: dict[str, Any]) -> dict[str, Any]:
        """The record of a method, completed."""
        path = self.output / "methods" / f"{method.key}.json"
        record: dict[str, Any] = read_json(path, RunError) if path.exists() else {"texts": {}, "seconds": 0.0}

        def save() -> None:
            write_text(path, json.dumps(record, indent=1))

        lacking = [text for text in self.measuring.texts if self.measuring.key(text) not in record["texts"]]
        artifact = self.output / "artifacts" / method.key
        known = method.recipe is None or "sizes" in record
        if not lacking and known and (not self.keep or method.recipe is None or artifact.exists()):
            self.reporter.note("  already measured")
        elif method.recipe is None:
            self._measure(self.checkpoint.directory, lacking, record, save)
        else:
            self._quantize(method, artifact, record, save)
            if "after" not in record:
                record["after"] = activations.after(measured, artifact, self.calibration, self.measuring.threads)
                save()
            self._measure(artifact, lacking, record, save)
        if self.keep and not record.get("kept"):
            record["kept"] = True
            save()
        if not record.get("kept"):
            shutil.rmtree(artifact, ignore_errors=True)
            with suppress(FileNotFoundError):
                artifact.with_name(f"{artifact.name}.log.jsonl").unlink()
        return record

    def _quantize(self, method: Method, artifact: Path, record: dict[str, Any], save: Callable[[], None]) -> None:
        # Done before, and asked for again because a text is new: the same artifact is made, its time is known.
        known = "sizes" in record

        def lap(seconds: float) -> None:
            if not known:
                record["seconds"] += seconds
                save()

        clock = _Clock(self.reporter, lap)
        assert method.recipe is not None
        done = quantize(
            self.checkpoint.directory,
            artifact,
            method.recipe,
            self.calibration,
            threads=self.measuring.threads,
            reporter=clock,
        )
        clock.lap()
        record["layers"] = [{key: value for key, value in entry.items() if key != "seconds"} for entry in done.log]
        record["sizes"] = _sizes(done.plan, done.log)
        save()

    def _measure(self, path: Path, texts: list[Text], record: dict[str, Any], save: Callable[[], None]) -> None:
        m = self.measuring
        for text in texts:
            began = time.monotonic()
            found = evaluate(path, text, window=m.window, limit=m.limit, dtype=m.dtype, threads=m.threads)
            record["texts"][m.key(text)] = found.to_dict() | {"seconds": time.monotonic() - began}
            save()
            self.reporter.note(f"  {text.name}: perplexity {found.perplexity:.4f}")

    def _row(self, method: Method, record: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "label": method.label,
            "method": method.text,
            "key": method.key,
            "recipe": method.recipe and method.recipe.to_dict(),
            "measured": [record["texts"][self.measuring.key(text)] for text in self.measuring.texts],
            "layers": record.get("layers", []),
            "after": record.get("after", {}),
            "quantize_seconds": record["seconds"] if method.recipe else None,
        }
        if method.recipe is not None:
            return row | record["sizes"]
        weights = [self.checkpoint.info(f"{layer.name}.weight") for layer in self.sizes.layers]
        stored = sum(info.elements * TORCH_DTYPES[info.dtype].itemsize * 8 for info in weights)
        return row | {
            "linear_bits": stored / self.sizes.linear_weights,
            "claimed_bits": None,
            "model_bits": self.sizes.original_bytes * 8 / self.sizes.parameters,
            "bytes": self.sizes.original_bytes,
            "outliers": None,
        }

    def _results(self, rows: list[dict[str, Any]], measured: dict[str, Any]) -> dict[str, Any]:
        """Rows with their excess over the original, where it was asked for, and what they share."""
        originals = [row for row in rows if row["recipe"] is None]
        for row in rows:
            for number, entry in enumerate(row["measured"]):
                if not math.isfinite(entry["perplexity"]):
                    entry["perplexity"] = None
                entry["excess"] = entry["loss"] - originals[0]["measured"][number]["loss"] if originals else None
        return {
            "kind": "comparison",
            "titles": list(self.titles),
            "skipped": list(self.skipped),
            **read_json(self.output / SHARED_NAME, RunError),
            "parameters": self.sizes.parameters,
            "linear_weights": self.sizes.linear_weights,
            "texts": [{"name": text.name, "sha256": text.sha256} for text in self.measuring.texts],
            "methods": rows,
            "before": activations.before(measured),
            "activations_on": measured["on"],
        }


def _sizes(made: Plan, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a finished artifact."""
    counts = sorted({layer.spec.outliers for layer in made.layers})
    return {
        "weight_bits": made.weight_bits,
        "linear_bits": made.linear_bits,
        "claimed_bits": made.claimed_after(layers),
        "model_bits": made.model_bits,
        "bytes": made.total_bytes,
        "outliers": [counts[0], counts[-1]],
    }
