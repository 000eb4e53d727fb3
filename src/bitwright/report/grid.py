"""Which methods a comparison runs: presets with options by name, all presets, and the grids of the BWA paper's tables.

A method is written as a preset and its options, `bwa:weights.feedback=column,weights.levels=dp`, or `original`, the
model as it is. A grid stands for a list of methods. Presets are looked up in the recipe when they are asked for: one
that is added there later joins by its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import RecipeError
from bitwright.recipe import PRESETS, Recipe, parse_option

ORIGINAL = "original"


@dataclass(frozen=True)
class Method:
    """One row of a comparison. `recipe` is None for the original model; `label` is what the row is called."""

    text: str
    label: str
    recipe: Recipe | None

    @property
    def key(self) -> str:
        """A plain name for files, whatever the recipe is called: equal for equal recipes alone."""
        if self.recipe is None:
            return ORIGINAL
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", self.recipe.name)[:40].strip("-.") or "recipe"
        return f"{name}-{hashlib.sha256(self.recipe.to_json().encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Grid:
    """Methods by one name: what they show, their (label, method) rows for a narrowest layer of so many inputs."""

    title: str
    rows: Callable[[int], list[tuple[str, str]]]


def _table1(_: int) -> list[tuple[str, str]]:
    """Weights and inputs as the paper has them; activations without balanced planes but in preset bwa."""
    plain = 'activations={"balance":"none"},kv={}'
    return [
        (ORIGINAL, ORIGINAL),
        ("QuaRot W4A4", "quarot"),
        ("Atom W4A4", "atom"),
        ("RTN W2A4", "rtn:activations.balance=none"),
        ("GPTQ W2A4", f"gptq:weights.bits=2,{plain}"),
        ("QuaRot W2A4", "quarot:weights.bits=2"),
        ("Atom W2A4", "atom:weights.bits=2"),
        ("BiLLM W(1+1)A16", "billm"),
        ("BiLLM W(1+1)A4", f"billm:{plain}"),
        ("BWA W(1+1)A(1x4)", "bwa"),
    ]


# Preset bwa taken apart; docs/recipe.md says what each option is.
_PLAIN = "weights.importance=none,activations.balance=none"
_GPTQ1 = f"weights.bits=1,weights.levels=minmax,weights.feedback=column,{_PLAIN}"


def _presets(_: int) -> list[tuple[str, str]]:
    return [(ORIGINAL, ORIGINAL), *((name, name) for name in PRESETS)]


def _table4(_: int) -> list[tuple[str, str]]:
    return [
        (ORIGINAL, ORIGINAL),
        ("neither (1 bit, equally spaced levels)", f"bwa:{_GPTQ1}"),
        ("minimum-distance levels", f"bwa:weights.bits=1,{_PLAIN}"),
        ("1+1 grouping", f"bwa:weights.levels=minmax,{_PLAIN}"),
        ("both", f"bwa:{_PLAIN}"),
    ]


def _table5(_: int) -> list[tuple[str, str]]:
    return [
        (ORIGINAL, ORIGINAL),
        ("1-bit GPTQ, groups of 128", f"bwa:{_GPTQ1},weights.outliers=0,weights.order=none"),
        ("+ int8 outliers", f"bwa:{_GPTQ1}"),
        ("+ minimum-distance levels", f"bwa:weights.bits=1,{_PLAIN}"),
        ("+ 1+1 grouping", f"bwa:{_PLAIN}"),
        ("+ Hessian weighting", "bwa:activations.balance=none"),
        ("+ balanced planes (preset bwa)", "bwa"),
    ]


def _table9(columns: int) -> list[tuple[str, str]]:
    """The paper's 0, 128, .. 1024 of 4096 inputs; on narrower layers the same shares, in steps of 16."""
    paper = (0, 128, 256, 512, 768, 1024)
    counts = {count if columns >= 4096 else (count * columns // 4096 + 15) // 16 * 16 for count in paper}
    fitting = sorted(count for count in counts if count <= columns // 2)
    return [(ORIGINAL, ORIGINAL), *((f"{count} int8 channels", f"bwa:weights.outliers={count}") for count in fitting)]


GRIDS: dict[str, Grid] = {
    "presets": Grid("Every preset", _presets),
    "paper-table1": Grid("Methods beside each other (Table 1 of the BWA paper)", _table1),
    "paper-table4": Grid("Minimum-distance levels and 1+1 grouping (Table 4 of the BWA paper)", _table4),
    "paper-table5": Grid("Ablation ladder (Table 5 of the BWA paper)", _table5),
    "paper-table9": Grid("Number of int8 outlier channels (Table 9 of the BWA paper)", _table9),
}


def split_commas(text: str) -> list[str]:
    """The parts between commas that stand in no bracket and no string of JSON, without blanks around them."""
    parts, depth = [""], 0
    for token in re.findall(r'"(?:\\.|[^"\\])*"|.', text, re.DOTALL):
        depth += (token in "{[") - (token in "}]")
        if token == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def split_methods(words: Iterable[str]) -> list[str]:
    """`["original,bwa:a=1,b=2", "rtn"]` -> original, bwa:a=1,b=2, rtn.

    A comma ends a method unless an option follows: what has a `=` and no `:` before it belongs to the method at hand.
    """
    methods: list[str] = []
    for word in words:
        first = True
        for piece in split_commas(word):
            if not piece:
                continue
            option = "=" in piece and ":" not in piece.partition("=")[0]
            if option and first:
                raise RecipeError(f"--methods: {piece!r} is an option without a method; write for example bwa:{piece}")
            if option:
                methods[-1] += ("," if ":" in methods[-1] else ":") + piece
            else:
                methods.append(piece)
            first = False
    return methods


def parse_method(text: str, common: Mapping[str, Any], label: str | None = None) -> Method:
    """One method. `common` are options of all of them, such as `calibration.sequences`; its own options win."""
    name, _, options = text.partition(":")
    if name == ORIGINAL:
        if options:
            raise RecipeError(f"method {text!r}: the original has no options; write 'original'")
        return Method(text, label or text, None)
    changes = dict(parse_option(option) for option in split_commas(options)) if options else {}
    try:
        recipe = PRESETS[name].with_options({**common, **changes})
    except RecipeError as error:
        raise RecipeError(f"method {text!r}: {error}") from None
    return Method(text, label or text, recipe)


def choose(words: Iterable[str], common: Mapping[str, Any], columns: int) -> tuple[list[Method], list[str], list[str]]:
    """What `--methods` asks for: the methods, the titles of the grids among them, and the names that do not exist.

    columns  inputs of the model's narrowest layer; the grids scale by it

    Raises RecipeError for options that do not go with their method, and for those behind a grid.
    """
    asked: list[tuple[str, str]] = []
    titles = []
    for word in split_methods(words):
        if word in GRIDS:
            titles.append(GRIDS[word].title)
            asked.extend(GRIDS[word].rows(columns))
        elif (name := word.partition(":")[0].strip()) in GRIDS:
            raise RecipeError(
                f"--methods {word!r}: {name} is a grid, a list of methods that have their own options, and takes none;"
                f" write {name} alone, or methods by name, for example bwa:weights.bits=3"
            )
        else:
            asked.append((" ".join(split_commas(word.replace(":", " ", 1))), word))
    methods: list[Method] = []
    unknown: list[str] = []
    for label, text in dict.fromkeys(asked):
        name = text.partition(":")[0]
        if name != ORIGINAL and name not in PRESETS:
            if name not in unknown:
                unknown.append(name)
        else:
            methods.append(parse_method(text, common, label))
    return methods, titles, unknown
