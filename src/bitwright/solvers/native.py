"""The block loop and the level searches in native code (csrc/solver/), on checked addresses and sizes.

Level searches, snapping, codes and the feedback inside a block do the torch code's float operations in its order and
give its bits. The update of the later columns may sum in another order than torch's matrix product: one sum a weight,
over the block's columns from left to right, whatever number of rows and threads there is. So a weight within rounding
of the middle of two levels may get the other code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix, matrix_shapes
from bitwright.native import native
from bitwright.recipe import WeightRecipe
from bitwright.solvers.levels import GridLevels

if TYPE_CHECKING:
    from bitwright.solvers.hessian import Factor

# By their numbers in csrc/solver/levels.h and kernels.h.
SEARCHES = ("em", "dp", "minmax", "uniform")
FEEDBACK = ("none", "block-diag", "block-tri", "column")


def available(*tensors: Tensor) -> bool:
    """Whether the native code is there and can read these: fp32 on the CPU."""
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return False
    return native() is not None


def serves(recipe: WeightRecipe) -> bool:
    """Whether the native code knows this search; grids that err least, for two rows, or with the largest magnitude as
    a level are found in torch."""
    plain = recipe.range == "minmax" and recipe.rows_a_scale == 1 and recipe.scale == "span"
    return recipe.levels in SEARCHES and plain


def upper_factor(hessian: Tensor, shift: float, threads: int | None = None) -> Tensor | None:
    """fp32 [columns, columns], symmetric -> U, upper triangular, inverse(H + shift I) = U^T U.

    None where H + shift I has no finite factor in fp32. The result does not depend on `threads`.
    """
    size = hessian.shape[0]
    if hessian.shape != (size, size):
        raise ValueError(f"a Hessian is square; found {list(hessian.shape)}")
    hessian = hessian.contiguous()
    upper = torch.empty_like(hessian)
    count = threads or torch.get_num_threads()
    return upper if native().upper_factor(hessian.data_ptr(), size, shift, upper.data_ptr(), count) else None


def solve_rows(
    weights: Tensor, factor: Factor, outliers: int, recipe: WeightRecipe, threads: int | None = None
) -> CodebookMatrix:
    """As `feedback.solve_rows`; fp32 on the CPU. Raises ValueError for shapes that do not go together."""
    rows, columns = check_rows(weights, factor, outliers)
    weights, upper, importance, dead = (
        tensor.contiguous() for tensor in (weights.detach(), factor.upper, factor.importance, factor.dead)
    )
    kind, group = recipe.kind, recipe.group_of(columns - outliers)
    shapes = matrix_shapes(rows, columns, recipe.bits, group, kind, outliers)
    parts = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}

    def address(name: str) -> int:
        return parts[name].data_ptr() if name in parts else 0

    native().solve_rows(
        weights.data_ptr(),
        upper.data_ptr(),
        importance.data_ptr(),
        dead.data_ptr(),
        rows,
        columns,
        outliers,
        group,
        SEARCHES.index(recipe.levels),
        FEEDBACK.index(recipe.feedback),
        recipe.bits,
        recipe.em_iterations,
        recipe.symmetric,
        recipe.clip,
        recipe.feedback_outliers,
        *(address(name) for name in ("codes", "scales", "levels", "zeros", "outliers", "outlier_scales")),
        threads or torch.get_num_threads(),
    )
    return CodebookMatrix(
        rows=rows,
        columns=columns,
        bits=recipe.bits,
        group=group,
        kind=kind,
        planes=parts["codes"],
        scales=parts["scales"],
        levels=parts.get("levels"),
        zeros=parts.get("zeros"),
        outliers=parts.get("outliers"),
        outlier_scales=parts.get("outlier_scales"),
    )


def check_rows(weights: Tensor, factor: Factor, outliers: int) -> tuple[int, int]:
    """Rows and columns of weights that go with such a factor; ValueError where they do not."""
    if weights.dim() != 2:
        raise ValueError(f"weights must be [rows, columns]; found {list(weights.shape)}")
    rows, columns = weights.shape
    if factor.upper.shape != (columns, columns) or factor.importance.shape != (columns,):
        raise ValueError(
            f"weights with {columns} columns need a factor [{columns}, {columns}] and as many importances;"
            f" found {list(factor.upper.shape)} and {list(factor.importance.shape)}"
        )
    if factor.dead.shape != (columns,) or factor.dead.dtype != torch.bool or not 0 <= outliers < columns:
        raise ValueError(f"of {columns} columns, {list(factor.dead.shape)} dead and {outliers} outliers make no sense")
    return rows, columns


def find_levels(block: Tensor, importance: Tensor, recipe: WeightRecipe, threads: int | None = None) -> GridLevels:
    """As `feedback.find_levels`; fp32 on the CPU. Raises ValueError for shapes that do not go together."""
    rows, width = check_block(block, importance)
    block, importance = block.detach().contiguous(), importance.contiguous()
    integers = torch.empty((rows, 2**recipe.bits), dtype=torch.int8)
    scale, zero = torch.empty(rows, dtype=torch.float16), torch.empty(rows, dtype=torch.uint8)
    native().find_levels(
        block.data_ptr(),
        importance.data_ptr(),
        rows,
        width,
        SEARCHES.index(recipe.levels),
        recipe.bits,
        recipe.em_iterations,
        recipe.symmetric,
        recipe.clip,
        integers.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        threads or torch.get_num_threads(),
    )
    return GridLevels(integers, scale, zero if recipe.kind == "uniform" else None)


def refine_block(
    target: Tensor, square: Tensor, grid: GridLevels, ranks: Tensor, threads: int | None = None
) -> tuple[GridLevels, Tensor]:
    """As `refine.improve`; fp32 on the CPU, at most 16 levels. Raises ValueError for shapes that do not go together.

    Sums are in another order than torch's: a level or a code may differ where two are as good as equal.
    """
    rows, width = target.shape
    count = grid.integers.shape[1]
    shapes = (square.shape, ranks.shape, grid.integers.shape, grid.scale.shape)
    if shapes != ((width, width), (rows, width), (rows, count), (rows,)) or count > 16:
        raise ValueError(f"a target [{rows}, {width}] does not go with {', '.join(str(list(s)) for s in shapes)}")
    target, square = target.contiguous(), square.contiguous()
    integers, scale = grid.integers.clone(), grid.scale.clone()
    narrow = ranks.to(torch.uint8).contiguous()
    addresses = (tensor.data_ptr() for tensor in (integers, scale, narrow))
    native().refine_block(
        target.data_ptr(), square.data_ptr(), rows, width, count, *addresses, threads or torch.get_num_threads()
    )
    return GridLevels(integers, scale), narrow.long()


def check_block(block: Tensor, importance: Tensor) -> tuple[int, int]:
    """Rows and width of a block that goes with such importances; ValueError where they do not."""
    if block.dim() != 2 or block.shape[1] < 1 or importance.shape != block.shape[1:]:
        raise ValueError(
            f"a block [rows, width] needs an importance for each of its columns, at least one;"
            f" found {list(block.shape)} and {list(importance.shape)}"
        )
    return block.shape[0], block.shape[1]


def real_levels(module: Any, search: str, block: Tensor, importance: Tensor, bits: int, iterations: int = 20) -> Tensor:
    """`em_levels`, `dp_levels` or `minmax_levels` by the native code, fp32 [rows, 2**bits] ascending; for the tests."""
    block, importance = block.float().contiguous(), importance.float().contiguous()
    rows, width = check_block(block, importance)
    levels = torch.empty(rows, 2**bits)
    number = SEARCHES.index(search)
    addresses = (block.data_ptr(), importance.data_ptr())
    module.real_levels(*addresses, rows, width, number, bits, iterations, levels.data_ptr())
    return levels


def snap(module: Any, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`levels.snap` by the native code: int8 [rows, k] and fp16 [rows]; k at most 16; for the tests."""
    levels = levels.float().contiguous()
    rows, count = levels.shape
    if count > 16:
        raise ValueError(f"at most 16 levels; found {count}")
    integers, scales = torch.empty(rows, count, dtype=torch.int8), torch.empty(rows, dtype=torch.float16)
    module.snap(levels.data_ptr(), rows, count, integers.data_ptr(), scales.data_ptr())
    return integers, scales
