"""What the page of an artifact has beside what the artifact tells of itself: measured for the page, with models run.

Perplexity on texts at hand, and the inputs of sites before and after, as a comparison measures them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitwright.artifact.manifest import read_manifest
from bitwright.calibration import Text, load_tokenizer
from bitwright.errors import ModelError, RunError
from bitwright.evaluation import evaluate_model, load
from bitwright.evaluation.perplexity import Perplexity
from bitwright.models import Checkpoint
from bitwright.report import activations
from bitwright.report.compare import Measuring


@dataclass(frozen=True)
class Fresh:
    """Measurements of the artifact, and of the original where it was at hand: one a text, in the order of the texts.

    before, after  curves of report.activations; `on` says what they were measured on; empty where not asked for
    """

    quantized: list[Perplexity] = field(default_factory=list)
    original: list[Perplexity] = field(default_factory=list)
    before: dict[str, list[float]] = field(default_factory=dict)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    on: str = ""


def measure(
    artifact: Path,
    measuring: Measuring,
    original: Path | None,
    calibration: Text | None,
    note: Callable[[str], None],
) -> Fresh:
    """Measure the artifact on the texts of `measuring`, and the model that it was made from where that is given.

    calibration  text for the activations of both; the original is needed for it
    note         told what is being done

    Raises RunError where the arguments do not go together, ModelError where `original` is another model, and what
    `evaluate` raises. Models are in memory one after the other.
    """
    manifest = read_manifest(artifact)
    _check_arguments(measuring, original, calibration)
    if original is not None:
        _check_original(artifact, manifest["model"]["files"], original)
    quantized = _perplexities(artifact, measuring, note)
    before = _perplexities(original, measuring, note) if original is not None else []
    if original is None or calibration is None:
        return Fresh(quantized, before)
    note("measuring the inputs of the sites of both models")
    seen = activations.site_maxima(original, calibration, measuring.threads)
    after = activations.after(seen, artifact, calibration, measuring.threads)
    return Fresh(quantized, before, activations.before(seen), after, seen["on"])


def _check_arguments(measuring: Measuring, original: Path | None, calibration: Text | None) -> None:
    if calibration is not None and original is None:
        raise RunError(
            "--calib is for the activations before and after, which need the original model; add --model MODEL"
        )
    if original is not None and calibration is None and not measuring.texts:
        raise RunError(
            "--model has nothing to be measured on; add --text FILE for perplexity, --calib FILE for activations"
        )
    if not measuring.texts and (measuring.window, measuring.limit) != (None, None):
        raise RunError("--window and --windows say how perplexity is measured; add --text FILE")


def _check_original(artifact: Path, expected: dict[str, str], original: Path) -> None:
    """Excess and activations say something only beside the very files that the artifact was made from."""
    found = Checkpoint(original).digests()
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            words = [digest and f"sha256 {digest[:16]}..." for digest in (found.get(name), expected.get(name))]
            raise ModelError(
                f"{original} is not the model that {artifact} was made from: its {name} has {words[0] or 'no file'},"
                f" the manifest says {words[1] or 'none'}; give the original directory"
            )


def _perplexities(path: Path, measuring: Measuring, note: Callable[[str], None]) -> list[Perplexity]:
    """Of one model, loaded once; texts that are too short are refused before the first is measured."""
    if not measuring.texts:
        return []
    model = load(path, measuring.dtype)
    measuring.check(path, model.config)
    tokenizer, found = load_tokenizer(path), []
    for text in measuring.texts:
        note(f"measuring {path.name} on {text.name}")
        found.append(
            evaluate_model(
                model,
                tokenizer,
                text,
                window=measuring.window,
                limit=measuring.limit,
                dtype=measuring.dtype,
                threads=measuring.threads,
            )
        )
    return found
