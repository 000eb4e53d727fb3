"""What tuning moves: real numbers and what is stored of them, and gradients straight through the rounding between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.codebook import CodebookMatrix
from bitwright.pipeline.tune import BETAS, EPSILON, adam, held_apart
from bitwright.pipeline.tuned import TunedMatrix, TunedVector
from bitwright.recipe import TuneRecipe, WeightRecipe
from bitwright.solvers import SOLVERS, factorize

ROWS, COLUMNS, OUTLIERS, GROUP = 6, 75, 7, 24  # a ragged last group

KINDS: dict[str, dict[str, Any]] = {
    "free": {"method": "bwa"},
    "uniform": {"method": "rtn", "levels": "uniform", "feedback": "none"},
    "symmetric": {"method": "rtn", "levels": "uniform", "feedback": "none", "symmetric": True},
}


def solved(kind: str, bits: int = 2, outliers: int = OUTLIERS, seed: int = 0) -> tuple[Tensor, CodebookMatrix]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, COLUMNS, generator=generator)
    inputs = torch.randn(200, COLUMNS, generator=generator)
    recipe = WeightRecipe(bits=bits, group=GROUP, **KINDS[kind])
    factor = factorize(inputs.T @ inputs / 100, recipe.damping, recipe.importance, 1)
    return weights, SOLVERS[recipe.method](weights, factor, outliers, recipe)


CASES = [
    *[(kind, bits, outliers) for kind in KINDS for bits, outliers in ((2, OUTLIERS), (3, 0))],
    ("free", 1, OUTLIERS),
    ("symmetric", 1, OUTLIERS),
]


@pytest.mark.parametrize(("kind", "bits", "outliers"), CASES)
def test_untouched_it_is_what_it_was(kind: str, bits: int, outliers: int) -> None:
    weights, matrix = solved(kind, bits, outliers)
    for target in (None, weights) if kind == "free" else (None,):
        tuned = TunedMatrix(matrix, target)
        tuned.settle()
        assert torch.equal(tuned.stored(), matrix.dequantize_site_order())
        found, expected = tuned.snapped().tensors(), matrix.tensors()
        assert found.keys() == expected.keys()
        # Of levels that are equal a weight may have either.
        same = [name for name in expected if name != "codes" or target is None]
        assert all(torch.equal(found[name], expected[name]) for name in same)


@pytest.mark.parametrize(("kind", "bits", "outliers"), CASES)
def test_what_is_used_is_what_is_stored(kind: str, bits: int, outliers: int) -> None:
    """After any move the dense weights are those of the snapped matrix, and near the real numbers."""
    weights, matrix = solved(kind, bits, outliers)
    tuned = TunedMatrix(matrix, weights if kind == "free" else None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for value in tuned.values.values():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        tuned.settle()
        snapped = tuned.snapped()
        assert torch.equal(tuned.stored(), snapped.dequantize_site_order())
        assert not torch.equal(tuned.stored(), matrix.dequantize_site_order())
        if kind == "free":
            levels = tuned.values["levels"] * tuned.unit
            assert bool((levels.diff(dim=-1) >= 0).all())
            steps = levels.abs().amax(dim=-1) / 127
            stored = snapped.integer_levels().float() * snapped.scales.float().unsqueeze(-1)  # type: ignore[union-attr]
            assert bool(((stored.sort(dim=-1).values - levels).abs() <= 0.51 * steps.unsqueeze(-1)).all())


def smooth(tuned: TunedMatrix, values: dict[str, Tensor]) -> Tensor:
    """The dense weights of these values without any rounding, by indices: an independent twin for autograd."""
    matrix = tuned.matrix
    rows = torch.arange(matrix.rows).unsqueeze(1)
    groups = torch.arange(matrix.normal_columns) // matrix.group
    codes = matrix.codes().long()
    real = values["levels"] * tuned.unit
    if matrix.kind == "free":
        rank = {2: [1, 2, 0, 3], 1: [0, 1], 3: list(range(8))}[matrix.bits]
        normal = real[rows, groups, torch.tensor(rank)[codes]]
    else:
        zeros = 2 ** (matrix.bits - 1) if matrix.zeros is None else matrix.zeros.long()[:, groups]
        times = 2 * codes - 1 if (matrix.kind, matrix.bits) == ("symmetric", 1) else codes - zeros
        normal = real[rows, groups, 0] * times
    if "outliers" not in values:
        return normal
    return torch.cat([normal, values["outliers"] * tuned.outlier_unit], dim=1)


@pytest.mark.parametrize(("kind", "bits", "outliers"), CASES)
def test_gradients_are_those_of_a_dense_twin(kind: str, bits: int, outliers: int) -> None:
    _, matrix = solved(kind, bits, outliers)
    tuned = TunedMatrix(matrix)
    values = {key: value.clone().requires_grad_() for key, value in tuned.values.items()}
    weights = smooth(tuned, values)
    torch.testing.assert_close(weights.detach(), tuned.stored(), rtol=1e-3, atol=1e-3)
    above = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad((weights * above).sum(), list(values.values()))
    found = tuned.pull(above)
    assert found.keys() == values.keys()
    for key, gradient in zip(values, expected, strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5)


def test_codes_follow_the_weights() -> None:
    """A weight that is moved onto another level takes its code; its gradient is that of the dense weight."""
    weights, matrix = solved("free")
    tuned = TunedMatrix(matrix, weights)
    before = matrix.codes()
    lowest = tuned.values["levels"][2, 1, 0]
    tuned.values["weights"][2, 1, 5] = lowest
    tuned.settle()
    after = tuned.snapped().codes()
    assert int(after[2, GROUP + 5]) == 2  # the code of the first level (docs/format.md)
    changed = (after != before).nonzero().tolist()
    assert changed in ([], [[2, GROUP + 5]])
    assert torch.equal(tuned.stored(), tuned.snapped().dequantize_site_order())
    above = torch.randn(ROWS, COLUMNS)
    pulled = tuned.pull(above)["weights"].flatten(1)[:, : COLUMNS - OUTLIERS]
    unit = tuned.unit.expand(-1, -1, GROUP).flatten(1)[:, : COLUMNS - OUTLIERS]
    torch.testing.assert_close(pulled, above[:, : COLUMNS - OUTLIERS] * unit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vectors_are_rounded_to_what_is_stored(dtype: torch.dtype) -> None:
    vector = (1 + 0.3 * torch.randn(50, generator=torch.Generator().manual_seed(3))).to(dtype).float()
    tuned = TunedVector(vector, dtype)
    assert torch.equal(tuned.stored(), vector)
    tuned.values["vector"].add_(0.01)
    assert torch.equal(tuned.stored().to(dtype).float(), tuned.stored())
    torch.testing.assert_close(tuned.pull(torch.ones(50))["vector"], tuned.unit.expand(50))


def test_a_table_for_a_whole_matrix_is_refused() -> None:
    weights, _ = solved("free")
    recipe = WeightRecipe(method="wgm", levels="dp", feedback="none", importance="none", order="none", outliers=0)
    factor = factorize(torch.eye(COLUMNS), recipe.damping, recipe.importance, 1)
    with pytest.raises(ValueError, match="'shared'"):
        TunedMatrix(SOLVERS["wgm"](weights, factor, 0, recipe))


def test_adam_in_pieces_is_adam() -> None:
    """Moments that come from a file and go back to it: the steps of one optimizer that was never stopped."""
    generator = torch.Generator().manual_seed(4)
    start = {"a": torch.randn(5, generator=generator), "b": torch.randn(3, 2, generator=generator)}
    gradients = [{key: torch.randn(v.shape, generator=generator) for key, v in start.items()} for _ in range(6)]
    rates = {"a": 0.1, "b": 0.02}
    whole = {key: value.clone() for key, value in start.items()}
    groups = [{"params": [whole[key]], "lr": rates[key]} for key in whole]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, foreach=False)
    for found in gradients:
        for key, value in whole.items():
            value.grad = found[key]
        optimizer.step()
    values = {key: value.clone() for key, value in start.items()}
    means, squares = ({key: torch.zeros_like(v) for key, v in start.items()} for _ in range(2))
    for step, found in enumerate(gradients):
        values, means, squares = ({key: v.clone() for key, v in part.items()} for part in (values, means, squares))
        adam(values, found, means, squares, rates, step)
    assert all(torch.equal(values[key], whole[key].detach()) for key in whole)
    still = values["a"].clone()
    adam(values, gradients[0], means, squares, {"a": 0.0, "b": 0.1}, 6)
    assert torch.equal(values["a"], still)


def test_rates_are_those_of_the_recipe() -> None:
    weights, matrix = solved("free")
    recipe = TuneRecipe(levels=0.1, outliers=0.2, vectors=0.3, codes=0.4)
    assert TunedMatrix(matrix, weights).rates(recipe) == {"levels": 0.1, "outliers": 0.2, "weights": 0.4}
    assert TunedVector(torch.ones(3), torch.float32).rates(recipe) == {"vector": 0.3}


def test_who_judges_does_not_learn() -> None:
    """The last segments judge, and no learner has a token in common with one, unless hardly any would be left."""
    # The third overlaps the last one; the second, the fourth and the fifth only touch judges.
    assert held_apart([0, 95, 190, 300, 500, 400, 195], 100, 2) == ([0, 1, 3, 4], [5, 6], True)
    assert held_apart([0, 10, 20, 30, 15], 100, 1) == ([0, 1, 2, 3], [4], False)
