from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitwright.calibration import HessianSum, row_blocks
from bitwright.recipe import WeightRecipe
from bitwright.solvers import factorize, join_rows
from bitwright.solvers.feedback import solve_rows
from bitwright.workers import Workers, default_threads

from .twins import correlated, gaussian


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def unit(item: int) -> int:
        time.sleep(0.002 * (7 - item % 8))
        return item * item

    with Workers(threads) as workers:
        assert workers.map(unit, range(16)) == [item * item for item in range(16)]
        assert workers.map(unit, []) == []
        assert workers.map(str, iter("ab")) == ["a", "b"]


def test_units_run_at_the_same_time() -> None:
    """Each unit waits for the other: with one thread, or one after the other, none would end."""
    barrier = threading.Barrier(2, timeout=20)
    with Workers(2) as workers:
        names = workers.map(lambda _: (barrier.wait(), threading.current_thread().name)[1], range(2))
    assert len(set(names)) == 2
    assert all(name.startswith("bitwright") for name in names)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_exception_is_raised_here(threads: int) -> None:
    done = []

    def unit(item: int) -> None:
        if item == 1:
            time.sleep(0.02)
            raise KeyError("first")
        if item == 2:
            raise ValueError("second, though earlier in time")
        done.append(item)

    with Workers(threads) as workers:
        with pytest.raises(KeyError, match="first"):
            workers.map(unit, range(200))
        assert workers.map(abs, [-1]) == [1]  # the pool is still good
    assert len(done) < 200 or threads > 1


@pytest.mark.parametrize("fails", [False, True])
def test_torch_threads_come_back(fails: bool) -> None:
    torch.set_num_threads(3)
    seen: list[int] = []

    def work() -> None:
        with Workers(2) as workers:
            assert torch.get_num_threads() == 1
            seen.extend(workers.map(lambda _: torch.get_num_threads(), range(4)))
            if fails:
                raise RuntimeError("stop")

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            work()
    else:
        work()
    assert seen == [1] * 4
    assert torch.get_num_threads() == 3


def test_units_run_on_one_torch_thread_whatever_else_is_set() -> None:
    with Workers(2) as workers:
        torch.set_num_threads(3)
        assert workers.map(lambda _: torch.get_num_threads(), range(4)) == [1] * 4


def test_units_make_no_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    with Workers(2) as workers:
        (result,) = workers.map(lambda x: weight * x, [2.0])
    assert not result.requires_grad
    assert result.is_inference()


def test_default_is_what_the_process_may_use() -> None:
    assert default_threads() >= 1
    with Workers() as workers:
        assert workers.threads == default_threads()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """A Hessian in row blocks and a solve in row chunks: the same bits on 1, 2 and 5 threads."""
    columns = 700
    x = correlated(columns, seed=1, tokens=90)
    weights = gaussian(48, columns, seed=2)
    recipe = WeightRecipe(group=64, feedback="block-tri")

    def run(threads: int) -> list[Tensor]:
        with Workers(threads) as workers:
            total = HessianSum(columns)
            for part in x.split(30):
                workers.map(lambda row, part=part: total.add_rows(row, part), row_blocks(columns))
                total.sequences += 1
            hessian = total.finish()
            factor = factorize(hessian, 0.01, "conditional")
            parts = workers.map(lambda row: solve_rows(weights[row : row + 8], factor, 32, recipe), range(0, 48, 8))
        return [hessian, factor.upper, *join_rows(parts, None).tensors().values()]

    expected = run(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(threads), expected, strict=True))
