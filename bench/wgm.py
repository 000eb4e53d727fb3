"""How long one core takes to group the weights of a 3B model as WGM does: groups, codes and bit planes.

Random bfloat16 matrices of the shapes of Llama-3.2-3B's decoder blocks, one at a time. Prints a table, and JSON with
--json: seconds by the clock and of the processor (which other work on the machine hardly changes), the median of
--repeat runs of each matrix, added up. With --layers fewer blocks are measured than the model has, and the seconds are
scaled to all of them. `error` is the squared error of the groups' means over the squared weights.

    python bench/wgm.py                                   # all 196 matrices, 2.8 G weights
    python bench/wgm.py --layers 2 --repeat 3 --levels windowed --levels dp
    python bench/wgm.py --layers 2 --groups 8 --window 64 --student 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.native import find
from bitwright.recipe import PRESETS, WeightRecipe
from bitwright.solvers.wgm import magnitudes_of, quantize


@dataclass
class Spent:
    """What one algorithm took for the matrices so far, in seconds, and the squared error that it left."""

    levels: str
    clock: float = 0.0
    processor: float = 0.0
    error: float = 0.0


def block_shapes(hidden: int, inner: int, heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """(rows, columns) of q, k, v, o, gate, up and down of one block."""
    keys = hidden // heads * kv_heads
    return [(hidden, hidden), *[(keys, hidden)] * 2, (hidden, hidden), *[(inner, hidden)] * 2, (hidden, inner)]


def random_matrix(shape: tuple[int, int], student: float | None) -> Tensor:
    """bfloat16 [rows, columns] around 0, of the size of a model's weights: Gaussian, or Student's t."""
    values = torch.randn(shape) if student is None else torch.distributions.StudentT(student).sample(shape)
    return values.mul_(0.02).bfloat16()


def measure(weights: Tensor, recipe: WeightRecipe, repeat: int, spent: Spent) -> None:
    """Adds one matrix."""
    clock, processor = [], []
    for _ in range(repeat):
        began = time.perf_counter(), time.process_time()
        _, _, groups = quantize(weights, recipe)
        clock.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    spent.clock += statistics.median(clock)
    spent.processor += statistics.median(processor)
    spent.error += float(groups.errors.sum())


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", action="append", choices=("windowed", "greedy", "dp"), help="may be repeated")
    parser.add_argument("--groups", type=int, default=32, help="magnitudes a matrix: a power of two, 2 to 128")
    parser.add_argument("--window", type=int, default=PRESETS["wgm"].weights.window, help="entries, for windowed")
    parser.add_argument("--layers", type=int, help="blocks to measure, scaled up to all; default: all")
    parser.add_argument("--blocks", type=int, default=28, help="blocks that the model has")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--inner", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--student", type=float, metavar="DEGREES", help="Student's t in place of a Gaussian")
    parser.add_argument("--float32", action="store_true", help="hand them over as float32, as a run reads any model")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    options.layers = options.blocks if options.layers is None else options.layers
    options.levels = options.levels or ["windowed", "dp"]
    if options.groups not in [2**bits for bits in range(1, 8)]:
        parser.error(f"--groups {options.groups} is no power of two from 2 to 128")
    for name in ("window", "layers", "blocks", "hidden", "inner", "heads", "kv_heads", "repeat"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} is below 1")
    if find() is None:
        parser.error("built without native kernels")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    torch.set_num_threads(1)  # the native code of WGM has one thread in any case
    torch.manual_seed(0)
    asked = {"weights.bits": options.groups.bit_length(), "weights.window": options.window}
    recipes = {
        levels: PRESETS["wgm"].with_options(asked | {"weights.levels": levels}).weights for levels in options.levels
    }
    shapes = block_shapes(options.hidden, options.inner, options.heads, options.kv_heads)
    spent = {levels: Spent(levels) for levels in recipes}
    energy = 0.0
    for layer in range(options.layers):
        for shape in shapes:
            weights = random_matrix(shape, options.student)
            found = magnitudes_of(weights)  # before the clock runs: the first touch of the code and of the weights
            energy += float((found.counts * found.values**2).sum())
            weights = weights.float() if options.float32 else weights
            for levels, recipe in recipes.items():
                measure(weights, recipe, options.repeat, spent[levels])
        so_far = ", ".join(f"{entry.levels} {entry.clock:.2f} s" for entry in spent.values())
        print(f"block {layer + 1}/{options.layers}: {so_far}", file=sys.stderr, flush=True)

    scale = options.blocks / options.layers
    matrices, weights_of_all = len(shapes) * options.blocks, options.blocks * sum(rows * cols for rows, cols in shapes)
    results = [
        {
            "levels": entry.levels,
            "seconds": entry.clock * scale,
            "processor_seconds": entry.processor * scale,
            "measured_seconds": entry.clock,
            "error": entry.error / energy,
        }
        for entry in spent.values()
    ]
    if options.json:
        counts = {"matrices": matrices, "weights": weights_of_all}
        print(json.dumps({"options": vars(options), **counts, "results": results}, indent=2))
        return
    how = f", {options.layers} of {options.blocks} blocks measured and scaled up" if scale != 1 else ""
    print(f"{matrices} matrices, {weights_of_all:,} weights, {options.groups} groups, one core, seconds{how}")
    print(f"{'':<12}{'clock':>10}{'processor':>12}{'error':>12}")
    for row in results:
        print(f"{row['levels']:<12}{row['seconds']:10.2f}{row['processor_seconds']:12.2f}{row['error']:12.6f}")


if __name__ == "__main__":
    main()
