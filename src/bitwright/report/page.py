"""What stands on a page, in its order; templates/page.html.j2 says how it looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bitwright.recipe import PRESETS, Recipe
from bitwright.report import figures, tables
from bitwright.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A drawing with what is written above and below it."""

    svg: str
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    figures: list[Figure]


@dataclass(frozen=True)
class Setting:
    """One method's recipe: every option, those that differ from its preset, and its linears."""

    title: str
    changes: str
    options: list[tuple[str, Any]]
    layers: list[dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """All that the template fills in."""

    title: str
    subtitle: str
    tables: list[Table]
    sections: list[Section]
    settings: list[Setting]
    provenance: list[tuple[str, str]] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as one HTML document that asks the network for nothing."""
    environment = Environment(
        loader=PackageLoader("bitwright.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Drawings are ours and escaped where they were made; everything else is escaped by the template.
    for section in page.sections:
        for index, figure in enumerate(section.figures):
            section.figures[index] = Figure(Markup(figure.svg), figure.title, figure.caption)
    return environment.get_template("page.html.j2").render(page=page, zip=zip)


def comparison_page(results: dict[str, Any]) -> Page:
    """Table, quality against bits, errors, activations and settings of a comparison."""
    table = tables.comparison_table(results)
    model = results["model"]["name"]
    quantized = [row for row in results["methods"] if row["recipe"] is not None]
    count = f"{len(quantized)} method{'' if len(quantized) == 1 else 's'}"
    sections = _quality(results)
    # A method that failed before its artifact was made has no layers.
    made = [(f"{number}. {row['label']}", row) for number, row in enumerate(results["methods"], 1) if row["layers"]]
    if made:
        titled = [(title, row["layers"]) for title, row in made]
        mixed = [bool(row["recipe"].get("allocate") or row["recipe"].get("sites")) for _, row in made]
        sections += [*bits_section(list(compress(titled, mixed))), error_section(titled)]
    sections.append(_activations(results))
    settings = [
        recipe_setting(f"{number}. {row['label']}", row["recipe"], row["layers"])
        for number, row in enumerate(results["methods"], 1)
        if row["recipe"] is not None
    ]
    return Page(
        title=f"{model}: {count} compared",
        subtitle=f"{results['parameters']:,} parameters, {results['linear_weights']:,} of them in the linears that are"
        " quantized; one calibration text, one protocol, all bits counted.",
        tables=[table],
        sections=sections,
        settings=settings,
        provenance=[*_protocols(results), *common_provenance(results)],
    )


def _quality(results: dict[str, Any]) -> list[Section]:
    """A figure for each text that a quantized model has a finite perplexity on; nothing where there is none."""
    originals = [row for row in results["methods"] if row["recipe"] is None]
    drawn = []
    for index, name in enumerate(tables.text_names(results)):
        points = tables.points(results, index)
        if not points:
            continue
        measured = originals[0]["measured"][index] if originals else None
        original = measured and measured["perplexity"]
        left_out = sum(bool(row["recipe"] and row["measured"][index]) for row in results["methods"]) - len(points)
        caption = f"{left_out} with infinite perplexity not shown." if left_out else ""
        drawn.append(Figure(figures.quality_against_bits(f"quality{index}", points, original), name, caption))
        # A broken method squeezes all others into a corner.
        best = min((perplexity for _, _, perplexity in points), default=0.0)
        near = [point for point in points if point[2] <= 2 * best]
        if len(near) > 1 and any(perplexity > 4 * best for _, _, perplexity in points):
            closer = figures.quality_against_bits(f"closer{index}", near, original)
            drawn.append(Figure(closer, f"{name}, closer", "Perplexities up to twice the lowest quantized one."))
    text = (
        "Numbers are those of the table. The line is the Pareto front: its methods (circles) have none below them that"
        " needs no more bits. Lower and further left is better."
    )
    return [Section("Perplexity against honest bits", text, drawn)] if drawn else []


def error_section(titled: list[tuple[str, list[dict[str, Any]]]]) -> Section:
    """A heat map for each (title, layers), all on one scale of colours."""
    limits = figures.error_range(layer for _, layers in titled for layer in layers)
    return Section(
        "Error by layer and site",
        "Squared error of each linear's output over its squared norm, on the calibration inputs with quantized"
        " activations and exact weights exchanged for quantized ones. Colours are logarithmic"
        f"{' and mean the same in all maps' if len(titled) > 1 else ''}; figures are under Settings.",
        [Figure(figures.error_map(f"error{i}", layers, limits), title) for i, (title, layers) in enumerate(titled)],
    )


def bits_section(titled: list[tuple[str, list[dict[str, Any]]]]) -> list[Section]:
    """A heat map for each (title, layers) of a recipe with sites stored in ways of their own; nothing for none."""
    if not titled:
        return []
    limits = figures.bits_range(layer for _, layers in titled for layer in layers)
    return [
        Section(
            "Bits by layer and site",
            "Honest bits a weight where sites are stored in ways of their own: codes, levels, scales, int8 channels,"
            " and with the first linear of a site the order of its inputs.",
            [Figure(figures.bits_map(f"bits{i}", layers, limits), title) for i, (title, layers) in enumerate(titled)],
        )
    ]


def _activations(results: dict[str, Any]) -> Section:
    """One figure a site and method that does something to its input; methods whose sites see the same share theirs."""
    ways: list[tuple[dict[str, Any], list[str]]] = []
    for number, row in enumerate(results["methods"], 1):
        same = [numbers for after, numbers in ways if after == row["after"]]
        if row["after"] and same:
            same[0].append(str(number))
        elif row["after"]:
            ways.append((row["after"], [str(number)]))
    captioned = [
        (after, f"As quantized by method{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}.")
        for after, numbers in ways
    ]
    lacking = "Methods that keep the model's channels as they are, or activations in 16 bits, have no figure."
    return activations_section(results["before"], results["activations_on"], captioned, lacking if ways else "")


def activations_section(
    before: dict[str, Any], measured_on: str, ways: list[tuple[dict[str, Any], str]], lacking: str
) -> Section:
    """Curves of report.activations: for each of `ways`, (curves after, caption), a figure a site; without any those
    before by themselves. `lacking` says who has no figure."""
    sites = list(dict.fromkeys(key.partition("/")[2] for key in before))
    drawn = [
        Figure(
            figures.activation_curves(f"activations{way}{site}", site, _of_site(before, site), _of_site(after, site)),
            caption=caption,
        )
        for way, (after, caption) in enumerate(ways or [({}, "")])
        for site in sites
    ]
    seen = (
        " Beside it what the method's own model quantizes: in its order and basis, after its Hadamard matrices,"
        " with the errors of all that comes before. Bars below: the int8 channels of each block."
        if ways
        else ""
    )
    words = [
        f"Largest absolute value of each input channel of a site in the original model, on {measured_on};"
        f" the largest of every hundredth or so of the channels is drawn.{seen}",
        lacking,
    ]
    return Section("Activations by channel", " ".join(filter(None, words)), drawn)


def _of_site(curves: dict[str, Any], site: str) -> dict[int, Any]:
    return {int(key.partition("/")[0]): curve for key, curve in curves.items() if key.partition("/")[2] == site}


def recipe_setting(title: str, recipe: dict[str, Any], layers: list[dict[str, Any]]) -> Setting:
    standard, words = PRESETS.get(recipe["name"]), f"preset {recipe['name']}"
    if standard is None:
        words = f"recipe {recipe['name']}"
    elif changes := Recipe.from_dict(recipe).changed_from(standard):
        words += " with " + ", ".join(f"{key}={option_word(value)}" for key, value in changes.items())
    return Setting(title, words, list(flat(recipe)), layers)


def option_word(value: Any) -> str:
    """A value as `--set` reads it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a recipe and their values; a part that is off is the word none."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else value


def _protocols(results: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"protocol, method {number}", next(entry["protocol"] for entry in row["measured"] if entry))
        for number, row in enumerate(results["methods"], 1)
        if any(row["measured"])
    ] + [(f"text {text['name']}", f"sha256 {text['sha256']}") for text in results["texts"]]


def common_provenance(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Calibration text, the original's files and the programs, from a manifest or from what a comparison shares."""
    rows = [("calibration", f"{facts['calibration']['name']}, sha256 {facts['calibration']['sha256']}")]
    rows += [(f"original {name}", f"sha256 {digest}") for name, digest in facts["model"]["files"].items()]
    programs = f"bitwright {facts['bitwright']}, torch {facts['torch']}, transformers {facts['transformers']}"
    return [*rows, ("made with", f"{programs}, {facts['cpu']}")]
