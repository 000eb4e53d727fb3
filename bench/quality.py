"""The ablation of the default recipe on one model: ideas alone, the path from the paper to it, and it without each.

    python bench/quality.py MODEL --calib wiki=train.txt --calib c4=sample.txt@0:0.5 --brief c4 \
        --text wikitext2.txt --text sample.txt@0.5:1 --spaced ptb.txt --out DIR

Every row is quantized and measured by `bitwright compare`'s engine, on each calibration text (on brief ones the paper,
the default and its tuning alone): killed, the same command goes on. `FILE@a:b` is the part of a file from the share a
to the share b, or from character a to character b where b is above 1; `FILE+FILE` is one text of both. Writes
DIR/quality.md and DIR/quality.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitwright.calibration import Text, read_text
from bitwright.calibration.text import text_of
from bitwright.pipeline.reporter import Silent
from bitwright.recipe import PRESETS, Recipe, preset
from bitwright.report.compare import Comparison, Measuring, failures
from bitwright.report.grid import ORIGINAL, Method

BASE, BEST = "bwa", "bitwright"
# Each idea by the keys of the recipe that it sets, in the order of the path.
IDEAS: dict[str, tuple[str, ...]] = {
    "one scale for all planes of a group": ("activations.balance",),
    "column feedback": ("weights.feedback",),
    "exact levels": ("weights.levels",),
    "channels in descending order": ("weights.order",),
    "refinement": ("weights.refine",),
    "damping": ("weights.damping", "weights.damping_over"),
    "re-forward": ("calibration.reforward",),
    "asymmetric target": ("calibration.asymmetry",),
    "residual correction": ("calibration.residual",),
    "Hadamard in each group": ("transform.hadamard",),
    "bits where the loss feels them": ("allocate",),
}


def value_at(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        found = found[part]
    return found


def options(recipe: Recipe, ideas: list[str]) -> dict[str, Any]:
    """The keys of these ideas as `recipe` has them."""
    return {key: value_at(recipe, key) for idea in ideas for key in IDEAS[idea]}


def rows(seeds: list[int], sizes: list[int], shared: dict[str, Any]) -> Iterator[tuple[str, str, Recipe]]:
    """(section, label, recipe) of every row; `shared` are options of all of them that do not say otherwise."""
    base, best = preset(BASE).with_options(shared), preset(BEST).with_options(shared)
    names = list(IDEAS)
    left = {key for key in _keys(base.model_dump(mode="json")) if value_at(base, key) != value_at(best, key)}
    if missing := left - {"name"} - {key for keys in IDEAS.values() for key in keys}:
        raise SystemExit(f"presets {BASE} and {BEST} differ in {', '.join(sorted(missing))}, which no idea names")
    for idea in names:
        yield "each idea alone", idea, base.with_options(options(best, [idea]))
    for count in range(len(names)):
        label = BASE if count == 0 else f"+ {names[count - 1]}"
        yield "the path", label, base.with_options(options(best, names[:count]))
    yield "the path", f"+ {names[-1]} ({BEST})", best
    for idea in names:
        yield "the default without", idea, best.with_options(options(base, [idea]))
    yield "tuning", f"{BEST} --tune", best.with_options({"tune": {}})
    for name, recipe in ((BASE, base), (BEST, best)):
        for seed in seeds:
            yield "seeds", f"{name}, seed {seed}", recipe.with_options({"calibration.seed": seed})
        for size in sizes:
            label = f"{name}, {size} segments"
            yield "calibration segments", label, recipe.with_options({"calibration.sequences": size})


def decides(section: str, label: str) -> bool:
    """Whether it is a row of brief calibration texts: the paper, the default, the default tuned."""
    return section == "tuning" or (section == "the path" and (label == BASE or label.endswith(f"({BEST})")))


def name_of(row: dict[str, Any]) -> str:
    """What a deciding row is called outside of its section: the path's last one is the default."""
    return BEST if row["section"] == "the path" and row["label"] != BASE else row["label"]


def _keys(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


class Told(Silent):
    """Says on standard error which row is at work."""

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def read(words: str, join: str = "none") -> Text:
    """`FILE`, `FILE@a:b`, or several of these with + between them."""
    texts = [_part(word, join) for word in words.split("+")]
    if len(texts) == 1:
        return texts[0]
    return text_of("+".join(text.name for text in texts), "\n\n".join(text.content for text in texts))


def _part(word: str, join: str) -> Text:
    path, at, part = word.partition("@")
    text = read_text([path], join)
    if not at:
        return text
    begin, end = (float(bound) for bound in part.split(":"))
    unit = len(text.content) if end <= 1 else 1
    return text_of(f"{text.name}@{part}", text.content[int(begin * unit) : int(end * unit)])


def table(section: str, found: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """A section in Markdown: for each calibration text the excess on each text."""
    calibrations = list(dict.fromkeys(row["calibration"] for row in found))
    heads = [f"{text} ({calibration})" for calibration in calibrations for text in texts]
    lines = [f"### {section[0].upper()}{section[1:]}", "", f"| | bits | s | {' | '.join(heads)} |"]
    lines.append("|---" * (3 + len(heads)) + "|")
    for label in dict.fromkeys(row["label"] for row in found):
        same = [row for row in found if row["label"] == label]
        excess = {row["calibration"]: [f"{value:.4f}" for value in row["excess"]] for row in same}
        cells = [cell for calibration in calibrations for cell in excess[calibration]]
        seconds = statistics.median(row["seconds"] for row in same)
        lines.append(f"| {label} | {same[0]['bits']:.4f} | {seconds:.0f} | {' | '.join(cells)} |")
    return [*lines, ""]


def against(found: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """What the default and its tuning lose as a share of the paper's loss, each text and their mean, and the time."""
    lines = ["### Against the paper", "", f"| | calibration | {' | '.join(texts)} | mean | time |"]
    lines.append("|---" * (4 + len(texts)) + "|")
    for calibration in dict.fromkeys(row["calibration"] for row in found):
        same = [row for row in found if row["calibration"] == calibration and decides(row["section"], row["label"])]
        paper = next((row for row in same if row["label"] == BASE), None)
        if paper is None:
            continue
        for row in same:
            if row is not paper:
                shares = [ours / theirs for ours, theirs in zip(row["excess"], paper["excess"], strict=True)]
                cells = " | ".join(f"{share:.2f}" for share in [*shares, statistics.mean(shares)])
                time = f"{row['seconds'] / paper['seconds']:.1f} x"
                lines.append(f"| {name_of(row)} | {calibration} | {cells} | {time} |")
    return [*lines, ""]


def deciding(found: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """The excess of the rows that every calibration text has, one below the other."""
    lines = ["### Calibration texts", "", f"| calibration | | {' | '.join(texts)} | mean |"]
    lines.append("|---" * (3 + len(texts)) + "|")
    for row in found:
        if decides(row["section"], row["label"]):
            cells = [f"{value:.4f}" for value in [*row["excess"], statistics.mean(row["excess"])]]
            lines.append(f"| {row['calibration']} | {name_of(row)} | {' | '.join(cells)} |")
    return [*lines, ""]


def document(found: list[dict[str, Any]], texts: list[str], brief: list[str]) -> list[str]:
    """Everything in Markdown; brief calibration texts have no columns in the tables of the sections."""
    lines = [*against(found, texts), *deciding(found, texts)]
    whole = [row for row in found if row["calibration"] not in brief]
    for section in dict.fromkeys(row["section"] for row in whole):
        lines += table(section, [row for row in whole if row["section"] == section], texts)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--calib", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--spaced", action="append", default=[], help="texts whose lines are joined by spaces (PTB)")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--window", type=int)
    parser.add_argument("--windows", type=int, help="at most so many windows of each text")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sizes", default="32,64")
    parser.add_argument("--brief", action="append", default=[], help="names of calibration texts for few rows")
    parser.add_argument("--sections", help="only sections whose names begin so, separated by commas")
    parser.add_argument("--out", required=True, type=Path)
    asked = parser.parse_args()
    if BEST not in PRESETS:
        raise SystemExit(f"there is no preset {BEST!r}")
    if missing := set(asked.brief) - {word.partition("=")[0] for word in asked.calib}:
        raise SystemExit(f"--brief names {', '.join(sorted(missing))}, which no --calib has")
    texts = [*(read(word) for word in asked.text), *(read(word, "space") for word in asked.spaced)]
    names = [text.name for text in texts]
    shared = {"calibration.sequences": asked.sequences, "calibration.length": asked.length}
    wanted = [
        row
        for row in rows([int(s) for s in asked.seeds.split(",")], [int(s) for s in asked.sizes.split(",")], shared)
        if asked.sections is None or any(row[0].startswith(section) for section in asked.sections.split(","))
    ]
    found: list[dict[str, Any]] = []
    for word in asked.calib:
        name, _, path = word.partition("=")
        here = [row for row in wanted if name not in asked.brief or decides(*row[:2])]
        methods = [Method(ORIGINAL, ORIGINAL, None)]
        for section, label, recipe in here:
            methods.append(Method(f"{section}: {label}", label, recipe.with_options({"name": "ablation"})))
        results = Comparison(
            asked.model,
            asked.out / name,
            list({method.key: method for method in methods}.values()),
            read(path),
            Measuring(texts, asked.window, asked.windows),
            reporter=Told(),
        ).carry_out()
        if failed := failures(results):
            raise SystemExit(f"{name}: {failed}")
        by_key = {row["key"]: row for row in results["methods"]}
        for (section, label, _), method in zip(here, methods[1:], strict=True):
            row = by_key[method.key]
            found.append(
                {
                    "section": section,
                    "label": label,
                    "calibration": name,
                    "bits": row["linear_bits"],
                    "seconds": row["quantize_seconds"],
                    "excess": [entry["excess"] for entry in row["measured"]],
                }
            )
    lines = document(found, names, asked.brief)
    (asked.out / "quality.md").write_text("\n".join(lines), encoding="utf-8")
    (asked.out / "quality.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
