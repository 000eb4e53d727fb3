"""GPTQ here beside GPTQModel's: the same weights and Hessian, the output error of both.

One linear layer with correlated inputs of unequal energy, in fp32; no model. GPTQModel's class is driven as its own
loop drives it: inputs in, quantized weights out. It is no dependency of this project; install it apart, for example

    python -m pip install --no-deps --target PEER gptqmodel pypcre logbar tokenicer device-smi defuser
    PYTHONPATH=PEER python bench/gptq_agreement.py

with more of its requirements where Python names one that is missing. Prints a row of Markdown for each setting: the
relative output error tr((W - Q) H (W - Q)^T) / tr(W H W^T) of round-to-nearest here, of GPTQ here and of the other, the
gap of the two (ours over theirs, less 1), and the weights that the two gave the same level but for the rounding of the
scale to fp16, which is what is stored here. Exits with 1 where a gap is above --most. Not judged is the searched grid
of 2 bits: there GPTQModel tries a second zero point, which GPTQ's own code does not, and is up to 3.5 % better.
"""

from __future__ import annotations

import argparse
import copy
import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.recipe import WeightRecipe
from bitwright.solvers import SOLVERS, factorize, output_error

DAMPING = 0.01


def layer(rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """(weights fp32 [rows, columns], inputs fp32 [tokens, columns]): few strong directions above a floor."""
    generator = torch.Generator().manual_seed(seed)
    rank = columns // 16
    mixing = torch.randn(rank, columns, generator=generator) * torch.linspace(0.3, 2.0, columns)
    inputs = torch.randn(tokens, rank, generator=generator) @ mixing / rank**0.5
    inputs += torch.randn(tokens, columns, generator=generator) * torch.linspace(0.2, 0.9, columns)
    # Energies in no order, as in a model.
    inputs = inputs[:, torch.randperm(columns, generator=generator)]
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs


def ours(weights: Tensor, hessian: Tensor, method: str, options: dict[str, Any]) -> Tensor:
    """Dequantized weights fp32 [rows, columns] in the order of the input channels."""
    feedback = "column" if method == "gptq" else "none"
    recipe = WeightRecipe(
        method=method, levels="uniform", feedback=feedback, importance="none", outliers=0, damping=DAMPING, **options
    )
    order = torch.arange(weights.shape[1])
    if recipe.order == "descending":
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = factorize(hessian[order][:, order], DAMPING, "none")
    result = torch.empty_like(weights)
    result[:, order] = SOLVERS[method](weights[:, order], factor, 0, recipe).dequantize_site_order()
    return result


def theirs(weights: Tensor, inputs: Tensor, options: dict[str, Any]) -> Tensor:
    """The same by GPTQModel's GPTQ class."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(
        bits=options["bits"],
        group_size=options["group"] or -1,
        sym=options["symmetric"],
        desc_act=options["order"] == "descending",
        act_group_aware=False,
        static_groups=False,
        damp_percent=DAMPING,
        offload_to_disk=False,
        mse=2.4 if options["range"] == "mse" else 0.0,
    )
    linear = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
    linear.weight.data.copy_(weights)
    solver = GPTQ(linear, qcfg=copy.deepcopy(config))
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(inputs.unsqueeze(0), torch.empty(0), batch_index=0)
    return solver.quantize()[0].detach().float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, nargs="+", default=[128, 0], help="0: a whole row")
    parser.add_argument("--most", type=float, default=0.01, help="gap that is agreement")
    arguments = parser.parse_args()
    try:
        import gptqmodel
    except ImportError as error:
        print(f"GPTQModel cannot be imported ({error}); the top of this file says how to install it", file=sys.stderr)
        return 2
    weights, inputs = layer(arguments.rows, arguments.columns, arguments.tokens, arguments.seed)
    hessian = 2.0 / len(inputs) * inputs.T @ inputs
    print(f"GPTQModel {gptqmodel.__version__}; {arguments.rows} x {arguments.columns}, {arguments.tokens} tokens")
    print("| bits | group | grid | order | RTN | GPTQ here | GPTQModel | gap | same level |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    variants = [
        (False, "none", "minmax"),
        (True, "none", "minmax"),
        (False, "descending", "minmax"),
        (False, "none", "mse"),
    ]
    for group, bits, (symmetric, order, span) in product(arguments.group, arguments.bits, variants):
        options = {"bits": bits, "group": group, "symmetric": symmetric, "order": order, "range": span}
        found = [ours(weights, hessian, "rtn", options), ours(weights, hessian, "gptq", options)]
        found.append(theirs(weights, inputs, options))
        errors = [lost / total for lost, total in (output_error(weights, matrix, hessian) for matrix in found)]
        gap = errors[1] / errors[2] - 1
        if (bits, symmetric, span) != (2, False, "mse"):
            worst = max(worst, abs(gap))
        same = float(((found[1] - found[2]).abs() <= 0.2 * weights.abs().max() * 2.0**-bits).float().mean())
        grid = ("symmetric" if symmetric else "zero point") + (", mse" if span == "mse" else "")
        print(
            f"| {bits} | {group or 'row'} | {grid} | {order} | "
            + " | ".join(f"{error:.5g}" for error in errors)
            + f" | {gap:+.2%} | {same:.1%} |",
            flush=True,
        )
    print(f"largest gap {worst:.2%}")
    return 0 if worst <= arguments.most else 1


if __name__ == "__main__":
    sys.exit(main())
