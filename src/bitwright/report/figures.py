"""Figures as inline SVG: drawn by matplotlib, coloured by the page.

matplotlib writes hexadecimal colours; those of INK stand for CSS variables and are exchanged, so that one drawing reads
on light and dark ground. Text stays text. Each figure is drawn for the width of a phone; wide screens set several side
by side.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitwright.errors import BitwrightError

if TYPE_CHECKING:
    from matplotlib.colors import Normalize

# Colours that the page's style sheet defines (templates/page.html.j2), and what stands for them in a drawing.
INK = {
    "#010203": "--ink",
    "#040506": "--soft",
    "#070809": "--grid",
    "#0a0b0c": "--accent",
    "#0d0e0f": "--second",
    "#101112": "--card",
}
TEXT, SOFT, GRID, ACCENT, SECOND, CARD = INK
WIDTH = 4.0  # inches of 72 points; on a phone a point is somewhat more than a pixel


def require_matplotlib() -> None:
    """Raises BitwrightError that says what to install. Called before work whose end is a page."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BitwrightError(
            "the page's figures need matplotlib, which is not installed; pip install 'bitwright[report]'"
        ) from None


def _figure(height: float, width: float = WIDTH) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style() -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "bitwright",
        "font.family": "sans-serif",
        "font.size": 8.5,
        "axes.titlesize": 9,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": SOFT,
        "axes.linewidth": 0.6,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": TEXT,
        "ytick.labelcolor": TEXT,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _svg(figure: Any, name: str, alt: str) -> str:
    """The drawing as an element of a page: ids of its own, a description, colours by variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    # A hundredth of a point is less than a screen shows; with all six digits curves are most of a page.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for colour, variable in INK.items():
        text = text.replace(colour, f"var({variable})")
    # The page sets the width; the drawing keeps its proportions by its viewBox.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{alt}"', text, count=1)
    return text


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, by rising bits: lower in bits or loss and not higher in the other.

    Points that are equal do not beat each other: all of them are on the front, or none.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def quality_against_bits(name: str, points: Sequence[tuple[int, float, float]], original: float | None) -> str:
    """Perplexity (log scale) against honest bits a weight, with the Pareto front.

    points  (number in the table, bits, perplexity); those that are not finite must be left out
    """
    import matplotlib

    with matplotlib.rc_context(_style()):
        figure = _figure(3.1)
        axes = figure.add_subplot()
        places = [(bits, perplexity) for _, bits, perplexity in points]
        front = pareto_front(places)
        axes.set_yscale("log")
        if original is not None:
            axes.axhline(original, color=SOFT, linestyle=(0, (4, 3)), linewidth=0.9)
            axes.annotate("original", (0.01, original), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", color=SOFT)  # fmt: skip
        if front:
            steps = [places[index] for index in front]
            axes.step(*zip(*steps, strict=True), where="post", color=ACCENT, linewidth=1.4)
        for index, (bits, perplexity) in enumerate(places):
            colour = ACCENT if index in front else SECOND
            axes.plot([bits], [perplexity], "o" if index in front else "s", color=colour, markersize=5.5)
        figure.canvas.draw()
        for (x, y), (number, bits, perplexity) in zip(_apart(axes, places), points, strict=True):
            axes.annotate(str(number), (bits, perplexity), xytext=(x, y), textcoords="offset points",
                          va="center", color=TEXT, fontsize=8.5)  # fmt: skip
        _log_ticks(axes, [value for _, value in places] + ([original] if original else []))
        axes.set_xlabel("honest bits a weight, quantized linears")
        axes.set_ylabel("perplexity")
        axes.margins(x=0.12, y=0.08)
        axes.grid(True, which="major")
        axes.set_axisbelow(True)
        return _svg(figure, name, "perplexity against honest bits a weight, with the Pareto front")


def _log_ticks(axes: Any, values: Iterable[float]) -> None:
    """Round and plain numbers on a log axis, also where it spans less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**exponent for exponent in exponents[:: max(1, len(exponents) // 6)]]
    if len(exponents) <= 4:
        ticks = [step * 10.0**exponent for exponent in exponents for step in (1, 2, 5)]
    if sum(low <= tick <= high for tick in ticks) < 3:
        ticks = [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if tick > 0]
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if bottom <= tick <= top]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _apart(axes: Any, places: Sequence[tuple[float, float]], line: float = 9.0) -> list[tuple[float, float]]:
    """Offsets in points of the labels right of `places`, moved up where they would lie on each other."""
    pixels = axes.transData.transform(places) * 72 / axes.figure.dpi if places else np.zeros((0, 2))
    offsets = [(5.0, 6.0)] * len(places)
    taken: list[tuple[float, float]] = []
    for index in sorted(range(len(places)), key=lambda i: float(pixels[i][1])):
        x, y = (float(value) for value in pixels[index])
        for other_x, other_y in sorted(taken, key=lambda place: place[1]):
            if abs(other_x - x) < 14 and abs(other_y - y) < line:
                y = other_y + line
        taken.append((x, y))
        offsets[index] = (5.0, 6.0 + y - float(pixels[index][1]))
    return offsets


def error_range(layers: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Smallest and largest positive error, for a colour scale that several heat maps share."""
    errors = [layer["error"] for layer in layers if layer["error"] > 0]
    return (min(errors), max(errors)) if errors else (1e-3, 1.0)


def error_map(name: str, layers: Sequence[dict[str, Any]], limits: tuple[float, float]) -> str:
    """Relative output error of each linear, logarithmic colours from the first to the second of `limits`."""
    from matplotlib.colors import LogNorm

    low, high = limits
    norm = LogNorm(low, high if high > low else low * 1.01)
    ticks = [low, math.sqrt(low * high), high] if high > low else [low]
    return _map(name, layers, "error", norm, ticks, "relative output error by block and linear")


def bits_range(layers: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Fewest and most bits a weight, for a colour scale that several heat maps share."""
    bits = [layer["bits"] for layer in layers]
    return min(bits), max(bits)


def bits_map(name: str, layers: Sequence[dict[str, Any]], limits: tuple[float, float]) -> str:
    """Honest bits a weight of each linear, on a scale of colours from the first to the second of `limits`."""
    from matplotlib.colors import Normalize

    low, high = limits
    ticks = [low, (low + high) / 2, high]
    return _map(name, layers, "bits", Normalize(low, high), ticks, "honest bits a weight by block and linear")


def _map(
    name: str, layers: Sequence[dict[str, Any]], key: str, norm: Normalize, ticks: Sequence[float], alt: str
) -> str:
    """A colour for each linear: blocks down, linears across in the order of their sites."""
    import matplotlib

    blocks = sorted({layer["block"] for layer in layers})
    columns: list[tuple[str, str]] = []
    for layer in layers:
        column = (layer["site"], layer["linear"].rpartition(".")[2].removesuffix("_proj"))
        if column not in columns:
            columns.append(column)
    values = np.full((len(blocks), len(columns)), np.nan)
    for layer in layers:
        column = (layer["site"], layer["linear"].rpartition(".")[2].removesuffix("_proj"))
        values[blocks.index(layer["block"]), columns.index(column)] = layer[key]
    with matplotlib.rc_context(_style()):
        figure = _figure(0.95 + min(4.2, max(1.0, 0.19 * len(blocks))))
        axes = figure.add_subplot()
        values = np.clip(values, norm.vmin, norm.vmax)
        image = axes.imshow(values, norm=norm, cmap="viridis", aspect="auto", interpolation="none")
        axes.set_xticks(range(len(columns)), [short for _, short in columns])
        step = max(1, math.ceil(len(blocks) / 12))
        axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
        axes.tick_params(length=0)
        axes.set_ylabel("block")
        sites = [site for site, _ in columns]
        for site in dict.fromkeys(sites):
            first, last = sites.index(site), len(sites) - 1 - sites[::-1].index(site)
            axes.annotate(site, ((first + last) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                          textcoords="offset points", ha="center", color=SOFT, fontsize=7.5)  # fmt: skip
            if first:
                axes.axvline(first - 0.5, color=CARD, linewidth=1.6)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()
        return _svg(figure, name, alt)


def activation_curves(
    name: str, site: str, before: dict[int, list[float]], after: dict[int, dict[str, Any]] | None
) -> str:
    """Largest |x| of each channel of one site, a line a block: in the model's order, and as the quantizer sees it.

    A bar in a block's colour below its curve: its int8 channels.
    """
    import matplotlib

    styles = ((ACCENT, "-"), (SECOND, "-"), (SOFT, "-"))
    with matplotlib.rc_context(_style()):
        figure = _figure(2.3)
        panels = figure.subplots(1, 2 if after else 1, sharey=True, squeeze=False)[0]
        for (block, curve), (colour, line) in zip(sorted(before.items()), styles, strict=False):
            panels[0].plot(np.linspace(0, 100, len(curve)), curve, line, color=colour, linewidth=1.1,
                           label=f"block {block}")  # fmt: skip
            if after and block in after:
                moved = after[block]["curve"]
                panels[1].plot(np.linspace(0, 100, len(moved)), moved, line, color=colour, linewidth=1.1)
        panels[0].set_yscale("log")
        moved_curves = [entry["curve"] for entry in (after or {}).values()]
        _log_ticks(panels[0], [value for curve in [*before.values(), *moved_curves] for value in curve])
        panels[0].set_title(f"{site}: as in the model", loc="left")
        panels[0].set_ylabel("max |x|")
        if after:
            panels[1].set_title("as quantized", loc="left")
            _int8_bars(panels[1], [(block, colour, after[block]["normal"])
                                   for block, (colour, _) in zip(sorted(before), styles, strict=False)
                                   if block in after])  # fmt: skip
        for panel in panels:
            panel.set_xlabel("channels, %")
            panel.grid(True, axis="y")
            panel.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=1.4)
        return _svg(figure, name, f"largest activation of each channel of site {site}, before and after")


def _int8_bars(axes: Any, blocks: Sequence[tuple[int, str, float]]) -> None:
    """A bar at the foot of the panel over the int8 channels of each (block, colour, share of the channels before them).

    Blocks differ where sites have numbers of int8 channels of their own; a block without any has no bar.
    """
    blocks = [entry for entry in blocks if entry[2] < 1]
    if not blocks:
        return
    low, high = np.log10(axes.get_ylim())
    room = 0.05 * len(blocks)
    axes.set_ylim(bottom=10 ** (low - (high - low) * room / (1 - room)))
    for row, (block, colour, normal) in enumerate(reversed(blocks)):
        axes.axvspan(100 * normal, 100, 0.05 * row + 0.005, 0.05 * row + 0.04, color=colour, linewidth=0,
                     gid=f"int8-{block}")  # fmt: skip
    first = min(normal for *_, normal in blocks)
    axes.annotate("int8", (100 * first, room / 2), xycoords=("data", "axes fraction"), xytext=(-3, 0),
                  textcoords="offset points", ha="right", va="center", color=SOFT, fontsize=7.5)  # fmt: skip
