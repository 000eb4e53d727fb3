"""A comparison carried out: each method quantized and measured, one after the other, and nothing done twice.

What is found is written down as it is found (folder.py), and a run of `quantize` resumes by itself, so that the same
command after a kill goes on where it stopped. An artifact is removed once it is measured unless it is to be kept, by
this call or an earlier one. A method that fails is written down with its reason, and the others go on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import bitwright
from bitwright.artifact.shards import TORCH_DTYPES, write_text
from bitwright.calibration import Text, consecutive_windows, load_tokenizer, random_windows, tokenize
from bitwright.errors import BitwrightError, ModelError, RecipeError, RunError, TextError
from bitwright.evaluation import check_dtype, evaluate, window_for
from bitwright.models import Checkpoint, Skeleton, context_length
from bitwright.models.checkpoint import read_json
from bitwright.pipeline import quantize
from bitwright.pipeline.plan import Plan, plan_for
from bitwright.pipeline.run import Reporter, Silent
from bitwright.pipeline.state import exclusive
from bitwright.recipe import preset
from bitwright.report import activations
from bitwright.report.clock import Clock
from bitwright.report.folder import Folder
from bitwright.report.grid import Method

# What only a finished artifact tells.
SIZES = ("weight_bits", "linear_bits", "claimed_bits", "model_bits", "bytes", "outliers")
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

    def check(self, directory: Path, config: Any) -> None:
        """Raises ModelError or TextError where the model in `directory`, with this config, cannot be so measured."""
        check_dtype(self.dtype)
        config = config.get_text_config(decoder=True)
        window, tokenizer = window_for(context_length(config), self.window), load_tokenizer(directory)
        for text in self.texts:
            consecutive_windows(tokenize(tokenizer, text, config.vocab_size), window, self.limit, text)


def failures(results: dict[str, Any]) -> str | None:
    """Which methods of a comparison failed and why, in one sentence; None where none did."""
    failed = [f"{row['label']} ({row['failed']})" for row in results["methods"] if row["failed"]]
    count = f"{len(failed)} of {len(results['methods'])} methods failed"
    return f"{count}: {'; '.join(failed)}; the same command tries again" if failed else None


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
        self.folder = Folder(Path(output).absolute())
        self.failed: dict[str, str] = {}
        self.page_due = 0.0
        self.calibration, self.measuring, self.titles = calibration, measuring, titles
        self.skipped, self.skip_unfit = list(skipped), skip_unfit
        self.keep, self.restart, self.reporter = keep_artifacts, restart, reporter or Silent()
        self.checkpoint = Checkpoint(model)
        skeleton = Skeleton(self.checkpoint)
        planned = [(method, self._planned(skeleton, method)) for method in methods]
        self.methods = [method for method, plan in planned if method.recipe is None or plan is not None]
        if not self.methods:
            raise RecipeError("no method is left to compare; name at least one, for example bwa")
        self.sizes = plan_for(skeleton, _PLAIN)
        directory, config = self.checkpoint.directory, skeleton.config
        measuring.check(directory, config)
        tokens = tokenize(load_tokenizer(directory), calibration, config.get_text_config(decoder=True).vocab_size)
        for method, plan in planned:
            if plan is not None:
                _check_calibration(method, plan, tokens, calibration)

    def _planned(self, skeleton: Skeleton, method: Method) -> Plan | None:
        """A method's plan, None for the original; raises what says why there is none, or leaves the method out where
        asked to."""
        try:
            if method.recipe is None:
                return None
            return plan_for(skeleton, method.recipe, 0, self.measuring.threads)
        except (RecipeError, ModelError) as error:
            if not self.skip_unfit:
                raise type(error)(f"method {method.text!r}: {error}; --skip-unknown goes on without") from None
            self.skipped.append(method.label)
            self.reporter.note(f"method {method.text!r} is left out: {error}")
            return None

    def carry_out(self) -> dict[str, Any]:
        """Do what is not done yet; write results.json, results.csv and report.html; returns the data of the first.

        The three are written after each method (the page not where methods take seconds), so that a run that is broken
        off leaves them, too. A method that fails has its reason under `failed` in its row; the next call that is the
        same tries it again.
        """
        self.folder.check()
        with exclusive(self.folder.path):
            shared = self._shared()
            began = self.folder.open(shared, self.restart)
            # By the name that it began with an unfinished run goes on, and an artifact is made again to the same bytes.
            self.calibration = replace(self.calibration, name=began["calibration"]["name"])
            measured = self._activations()
            results: dict[str, Any] = {}
            for number, method in enumerate(self.methods, 1):
                self.reporter.note(f"method {number} of {len(self.methods)}: {method.label}")
                if self._attempt(method, measured) or number == len(self.methods):
                    results = self._results(shared, measured)
                    self._publish(results, last=number == len(self.methods))
            return results

    def _publish(self, results: dict[str, Any], last: bool) -> None:
        """Write what there is; between methods a page only where drawing it takes a small part of the time."""
        self.folder.publish(results)
        began = time.monotonic()
        if last or began >= self.page_due:
            self.folder.draw(results)
            ended = time.monotonic()
            self.page_due = ended + 10 * (ended - began)

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

    def _activations(self) -> dict[str, Any]:
        path = self.folder.path / "activations.json"
        if not path.exists():
            self.reporter.note("measuring the inputs of the original model's sites")
            # The file may have another name in a later call.
            unnamed = replace(self.calibration, name="the calibration text")
            found = activations.site_maxima(self.checkpoint.directory, unnamed, self.measuring.threads)
            write_text(path, json.dumps(found))
        return read_json(path, RunError)

    def _attempt(self, method: Method, measured: dict[str, Any]) -> bool:
        """Complete a method's record, or write down why that failed; returns whether there was anything to do."""
        if method.key in self.failed:  # the same recipe by another name
            self.reporter.note("  failed above")
            return False
        try:
            return self._finish(method, measured)
        except (BitwrightError, OSError) as error:
            where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            self.failed[method.key] = reason = " ".join(str(where).split())
            self.folder.save(method.key, self.folder.record(method.key) | {"failed": reason})
            self.reporter.note(f"  failed: {reason}")
            return True

    def _finish(self, method: Method, measured: dict[str, Any]) -> bool:
        key = method.key
        record, artifact = self.folder.record(key), self.folder.artifact(key)

        def save() -> None:
            self.folder.save(key, record)

        lacking = self._lacking(record)
        known = method.recipe is None or "sizes" in record
        done = not lacking and known and (not self.keep or method.recipe is None or artifact.exists())
        if done:
            self.reporter.note("  already measured")
        elif method.recipe is None:
            self._measure(self.checkpoint.directory, lacking, record, save)
        else:
            self._quantize(method, artifact, record, save)
            if "after" not in record:
                record["after"] = activations.after(measured, artifact, self.calibration, self.measuring.threads)
                save()
            self._measure(artifact, lacking, record, save)
        if record.pop("failed", None):
            save()
        if self.keep and not record.get("kept"):
            record["kept"] = True
            save()
        if not record.get("kept"):
            self.folder.drop_artifact(key)
        return not done

    def _quantize(self, method: Method, artifact: Path, record: dict[str, Any], save: Callable[[], None]) -> None:
        # Done before, and asked for again because a text is new: the same artifact is made, its time is known.
        known = "sizes" in record

        def lap(seconds: float) -> None:
            if not known:
                record["seconds"] += seconds
                save()

        clock = Clock(self.reporter, lap)
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

    def _lacking(self, record: dict[str, Any]) -> list[Text]:
        """The texts that a method is not measured on yet."""
        return [text for text in self.measuring.texts if self.measuring.key(text) not in record["texts"]]

    def _row(self, method: Method) -> dict[str, Any] | None:
        """What is known of a method, all of it or why it is not more; None where its turn has not come."""
        record = self.folder.record(method.key)
        lacking = self._lacking(record)
        failed = self.failed.get(method.key) or (record.get("failed") if lacking else None)
        if lacking and not failed:
            return None
        # A file may have another name than when it was measured.
        found = [(record["texts"].get(self.measuring.key(text)), text.name) for text in self.measuring.texts]
        row: dict[str, Any] = {
            "label": method.label,
            "method": method.text,
            "key": method.key,
            "recipe": method.recipe and method.recipe.to_dict(),
            "failed": failed,
            "measured": [entry and entry | {"text": name} for entry, name in found],
            "layers": record.get("layers", []),
            "after": record.get("after", {}),
            "quantize_seconds": record["seconds"] if method.recipe else None,
        }
        if method.recipe is not None:
            return row | (record.get("sizes") or dict.fromkeys(SIZES))
        weights = [self.checkpoint.info(f"{layer.name}.weight") for layer in self.sizes.layers]
        stored = sum(info.elements * TORCH_DTYPES[info.dtype].itemsize * 8 for info in weights)
        return row | {
            "linear_bits": stored / self.sizes.linear_weights,
            "claimed_bits": None,
            "model_bits": self.sizes.original_bytes * 8 / self.sizes.parameters,
            "bytes": self.sizes.original_bytes,
            "outliers": None,
        }

    def _results(self, shared: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """Rows with their excess over the original, where it was asked for, and what they share."""
        found = [(method, self._row(method)) for method in self.methods]
        rows = [row for _, row in found if row is not None]
        originals = [row["measured"] for row in rows if row["recipe"] is None]
        before = (
            [entry and entry["loss"] for entry in originals[0]] if originals else [None] * len(self.measuring.texts)
        )
        for row in rows:
            for entry, loss in zip(row["measured"], before, strict=True):
                if entry is None:
                    continue
                if not math.isfinite(entry["perplexity"]):
                    entry["perplexity"] = None
                entry["excess"] = None if loss is None else entry["loss"] - loss
        return {
            "kind": "comparison",
            "titles": list(self.titles),
            "skipped": list(self.skipped),
            "unfinished": [method.label for method, row in found if row is None],
            **shared,
            "parameters": self.sizes.parameters,
            "linear_weights": self.sizes.linear_weights,
            "texts": [{"name": text.name, "sha256": text.sha256} for text in self.measuring.texts],
            "methods": rows,
            "before": activations.before(measured),
            "activations_on": measured["on"],
        }


def _check_calibration(method: Method, plan: Plan, tokens: Tensor, text: Text) -> None:
    """Raises TextError where the calibration text has no segment of the length that the method asks for."""
    asked = plan.recipe.calibration
    try:
        random_windows(tokens, asked.sequences, plan.length, asked.seed, text)
    except TextError as error:
        raise TextError(f"method {method.text!r}: {error} (--length)") from None


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
