"""How long a layer takes from its Hessian to its codes: the factor, and the block loop, native and in torch.

Random weights, a Hessian of correlated inputs. Prints a table, and JSON with --json. `gap` is the output error by the
native code over that by torch, less 1.

    python bench/solver.py --columns 11008 --threads 2 --recipe em+block-diag --recipe dp+column

With --preset the solver of a whole recipe instead, refinement and asymmetric target included, by processor time: what
other work on the machine hardly changes.

    python bench/solver.py --preset bitwright --preset bwa
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from bitwright.native import find
from bitwright.recipe import PRESETS, Recipe, WeightRecipe, outlier_count
from bitwright.solvers import (
    SOLVERS,
    Factor,
    asymmetric_target,
    factorize,
    hessian,
    input_drift,
    native,
    output_error,
    residual_correction,
)
from bitwright.solvers.feedback import solve_rows_reference
from bitwright.workers import Workers

DAMPING = 0.01
CHUNK = 256  # rows that the pipeline gives to a worker


def correlated_hessian(columns: int, generator: torch.Generator) -> Tensor:
    """fp32 [columns, columns]: a spectrum with a few strong directions above a floor, channels of unequal energy."""
    rank = max(1, columns // 16)
    mixing = torch.randn(rank, columns, generator=generator) * torch.linspace(0.3, 2.0, columns)
    total = mixing.T @ mixing / rank
    total.diagonal().add_(torch.linspace(0.3, 2.0, columns).square() * 0.2)
    return total


def seconds(work: Any, repeat: int) -> tuple[float, Any]:
    """The best time of `repeat` runs and what the last one gave."""
    best, result = float("inf"), None
    for _ in range(repeat):
        result = None
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def solve_in_torch(weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe, threads: int) -> Tensor:
    """As the pipeline does it: chunks of rows on worker threads. Returns the dequantized weights."""
    with Workers(threads) as workers:
        parts = workers.map(
            lambda row: solve_rows_reference(weights[row : row + CHUNK], factor, outliers, recipe),
            range(0, weights.shape[0], CHUNK),
        )
    return torch.cat([part.dequantize_site_order() for part in parts])


def factor_in_torch(total: Tensor, shift: float) -> None:
    """The factor without the native code, on one thread, as one worker does it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hessian.upper_factor_reference(total, shift, torch.float32)
    torch.set_num_threads(threads)


def solve_preset(weights: Tensor, total: Tensor, recipe: Recipe, threads: int) -> tuple[float, float]:
    """Processor seconds of the factor, and of the solver behind it, in the pipeline's units of work.

    Where the recipe corrects the residual stream, of a linear that writes to it.
    """
    rows, columns = weights.shape
    options, asymmetry, residual = recipe.weights, recipe.calibration.asymmetry, recipe.calibration.residual
    outliers = outlier_count(columns, options.outliers)
    chunk = rows if options.kind in ("shared", "salient") else CHUNK
    keep = options.refine > 0 or asymmetry > 0
    began = time.process_time()
    factor = factorize(total, options.damping, options.importance, threads, keep_hessian=keep)
    between = time.process_time()
    drift = input_drift(total * 0.99, factor) if asymmetry else None

    def solve(row: int) -> None:
        part = weights[row : row + chunk]
        aim = part if drift is None else asymmetric_target(part, drift, factor, asymmetry)
        if residual:
            aim = aim + residual_correction(0.01 * part, factor, residual)
        SOLVERS[options.method](aim, factor, outliers, options)

    with Workers(threads) as workers:
        workers.map(solve, range(0, rows, chunk))
    return between - began, time.process_time() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--outliers", type=int, default=128)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--recipe", action="append", help="levels+feedback, may be repeated")
    parser.add_argument("--preset", action="append", choices=sorted(PRESETS), help="a whole recipe, may be repeated")
    parser.add_argument("--torch-rows", type=int, default=0, help="rows to solve in torch too, scaled up; 0: none")
    parser.add_argument("--torch-factor", action="store_true", help="time the factor in torch too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if find() is None:
        parser.error("built without native kernels")

    generator = torch.Generator().manual_seed(0)
    total = correlated_hessian(options.columns, generator)
    weights = torch.randn(options.rows, options.columns, generator=generator) * 0.02
    results: list[dict[str, Any]] = []
    if options.preset:
        # Models are stored in 16 bits, which some solvers make use of.
        weights = weights.bfloat16().float()
        for name in options.preset:
            shared, own = solve_preset(weights, total, PRESETS[name], options.threads)
            results.append({"what": name, "factor": shared, "solver": own})
            if not options.json:
                print(f"{name:<12}factor {shared:8.2f}  solver {own:8.2f}  processor seconds", flush=True)
        if options.json:
            print(json.dumps({"options": vars(options), "results": results}, indent=2))
        return

    def note(what: str, native_seconds: float, torch_seconds: float | None = None, gap: float | None = None) -> None:
        results.append({"what": what, "native": native_seconds, "torch": torch_seconds, "gap": gap})
        if not options.json:
            there = f"{torch_seconds:10.3f}" if torch_seconds is not None else " " * 10
            print(f"{what:<24}{native_seconds:10.3f}{there}" + (f"{gap:12.1e}" if gap is not None else ""), flush=True)

    if not options.json:
        print(f"{options.rows} x {options.columns}, {options.threads} threads, seconds")
        print(f"{'':<24}{'native':>10}{'torch':>10}{'gap':>12}")
    taken, factor = seconds(lambda: factorize(total, DAMPING, "conditional", options.threads), options.repeat)
    reference = None
    if options.torch_factor:
        shift = DAMPING * float(total.diagonal().mean())
        reference, _ = seconds(lambda: factor_in_torch(total, shift), options.repeat)
    note("factor", taken, reference)
    for name in options.recipe or ["em+block-diag", "dp+column"]:
        levels, _, feedback = name.partition("+")
        recipe = WeightRecipe(group=options.group, bits=options.bits, levels=levels, feedback=feedback)
        taken, matrix = seconds(
            lambda recipe=recipe: native.solve_rows(weights, factor, options.outliers, recipe, options.threads),
            options.repeat,
        )
        there = gap = None
        if options.torch_rows:
            some = weights[: options.torch_rows]
            there, expected = seconds(
                lambda recipe=recipe, some=some: solve_in_torch(
                    some, factor, options.outliers, recipe, options.threads
                ),
                1,
            )
            there *= options.rows / len(some)
            found = matrix.dequantize_site_order()[: len(some)]
            gap = output_error(some, found, total)[0] / output_error(some, expected, total)[0] - 1
        note(name, taken, there, gap)
    if options.json:
        print(json.dumps({"options": vars(options), "results": results}, indent=2))


if __name__ == "__main__":
    main()
