"""The ablation ladder of the BWA paper (its Table 5) on one model.

    python bench/ladder.py MODEL --calib FILE --text FILE

Each rung is preset bwa with options; docs/recipe.md lists them. Finished rungs are kept in --work and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import bitwright
from bitwright.calibration import read_text
from bitwright.recipe import parse_option

GPTQ1 = ["weights.bits=1", "weights.levels=minmax", "weights.feedback=column"]
PLAIN = ["weights.importance=none", "activations.balance=none"]
LADDER: dict[str, list[str]] = {
    "1-bit GPTQ, groups of 128": [*GPTQ1, *PLAIN, "weights.outliers=0", "weights.order=none"],
    "+ int8 outliers": [*GPTQ1, *PLAIN],
    "+ minimum-distance levels": ["weights.bits=1", *PLAIN],
    "+ 1+1 grouping": PLAIN,
    "+ Hessian weighting": ["activations.balance=none"],
    "+ balanced planes (preset bwa)": [],
}
OTHERS: dict[str, tuple[str, list[str]]] = {
    "rtn, 2 bits, same outliers, A4, KV4": ("rtn", []),
    "bwa, outlier columns not updated (the listing)": ("bwa", ["weights.feedback_outliers=false"]),
    "bwa, block-tri feedback": ("bwa", ["weights.feedback=block-tri"]),
    "bwa, column feedback": ("bwa", ["weights.feedback=column"]),
    "bwa, column feedback, exact levels": ("bwa", ["weights.feedback=column", "weights.levels=dp"]),
    "bwa, descending order, column feedback": ("bwa", ["weights.feedback=column", "weights.order=descending"]),
    "bwa, literal balance": ("bwa", ["activations.balance=literal"]),
    "bwa, 16-bit activations and cache": ("bwa", ["activations=none", "kv=none"]),
    "bwa, no outliers": ("bwa", ["weights.outliers=0"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--calib", nargs="+", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=64, help="windows of the text to measure on")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--work", default="ladder-work")
    arguments = parser.parse_args()
    calibration, text = read_text(arguments.calib), read_text(arguments.text)
    rows = {name: ("bwa", options) for name, options in LADDER.items()} | OTHERS
    print("| recipe | bits, linears | perplexity | excess |\n|---|---|---|---|")
    for number, (name, (preset, options)) in enumerate(rows.items()):
        recipe = bitwright.preset(preset).with_options(
            {**dict(parse_option(option) for option in options), "calibration.sequences": arguments.sequences}
        )
        output = Path(arguments.work) / f"rung-{number:02d}"
        output.parent.mkdir(parents=True, exist_ok=True)
        done = bitwright.quantize(
            arguments.model, output, recipe, calibration, evaluation=text, evaluation_windows=arguments.windows
        )
        measured = done.measured["evaluation"]
        perplexity = math.exp(measured["loss_quantized"])
        (output.parent / f"rung-{number:02d}.json").write_text(
            json.dumps({"name": name, "options": options, "bits": done.plan.linear_bits, **measured})
        )
        print(f"| {name} | {done.plan.linear_bits:.4f} | {perplexity:.3f} | {measured['excess']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
