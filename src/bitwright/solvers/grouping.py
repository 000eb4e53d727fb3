"""Dynamic grouping: sorted magnitudes cut into a few contiguous groups, each of which becomes its mean.

The three algorithms of WGM (Zheng et al., arXiv 2509.03054) under their common cost, and the exact optimum in a time
that real matrices allow. With m members the cost of a group is their squared error about the mean plus penalty / m;
without the penalty this is k-means in one dimension.

- `dynamic_grouping`, algorithm 1: the optimum by dynamic programming, O(groups n^2).
- `merge_windows`, algorithm 3: starts from windows of consecutive sorted entries and merges the pair of neighbours
  whose *merged* cost is least until `groups` are left. A window of one entry is algorithm 2, greedy merging.
- `optimal_grouping`: the optimum again, over *distinct* magnitudes with their counts, in O(groups u log u). A matrix of
  16-bit numbers has a few thousand distinct magnitudes however large it is (solvers/wgm.py sees to it that others have
  not many more). Without a penalty equal entries belong into one group anyway, so nothing is lost.

All sums are float64, about the mean of each window: in float32 the squared errors of windows, 1e-10, drown.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.native import native

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Magnitudes:
    """Distinct magnitudes, ascending float64 [u], and how many entries have each, int64 [u].

    `binned`: they are means of magnitudes that are nearly equal, and entries are not told apart inside of them.
    """

    values: Reals
    counts: Integers
    binned: bool = False

    @classmethod
    def of(cls, entries: NDArray[np.floating[Any]]) -> Magnitudes:
        """From the entries themselves, in any order and of any sign."""
        values, counts = np.unique(np.abs(entries), return_counts=True)
        return cls(values.astype(np.float64), counts.astype(np.int64))

    @property
    def entries(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class Grouping:
    """Groups as intervals of the sorted entries.

    begins  int64 [groups], the first entry of each group
    levels  float64 [groups], the mean of each, ascending
    counts  int64 [groups], the members of each
    errors  float64 [groups], the squared error of each about its mean
    """

    begins: Integers
    levels: Reals
    counts: Integers
    errors: Reals

    def cost(self, penalty: float = 0.0) -> float:
        """What the algorithms make small: the squared errors plus penalty / members, summed over the groups."""
        return float((self.errors + penalty / self.counts).sum())


def describe(magnitudes: Magnitudes, begins: Integers) -> Grouping:
    """The groups that begin at these of the sorted entries; they may part equal entries."""
    ends = magnitudes.counts.cumsum()
    # Runs of equal entries of one group: they begin where a group or another magnitude begins.
    edges = np.union1d(begins, np.concatenate([[0], ends[:-1]]))
    lengths = np.diff(np.append(edges, ends[-1])).astype(np.float64)
    values = magnitudes.values[np.searchsorted(ends, edges, side="right")]
    first_runs = np.searchsorted(edges, begins)
    counts = np.add.reduceat(lengths, first_runs)
    means = np.add.reduceat(lengths * values, first_runs) / counts
    apart = values - np.repeat(means, np.diff(np.append(first_runs, len(edges))))
    errors = np.add.reduceat(lengths * apart * apart, first_runs)
    return Grouping(begins, means, counts.astype(np.int64), errors)


def dynamic_grouping(magnitudes: Magnitudes, groups: int, penalty: float) -> Grouping:
    """Algorithm 1 over the distinct magnitudes, table row by table row; O(groups u^2): the oracle of the fast one.

    At most as many groups as there are distinct magnitudes. Of equal costs the earlier begin is taken.
    """
    values, weights = magnitudes.values, magnitudes.counts.astype(np.float64)
    count, first, second = (
        np.concatenate([[0.0], np.cumsum(terms)]) for terms in (weights, weights * values, weights * values * values)
    )
    size = len(values)

    def costs(end: int, begins: slice) -> Reals:
        members, total = count[end] - count[begins], first[end] - first[begins]
        return np.maximum(second[end] - second[begins] - total * total / members, 0.0) + penalty / members

    best = np.array([np.inf, *(costs(end, slice(0, 1))[0] for end in range(1, size + 1))])
    choices = []
    for group in range(1, min(groups, size)):
        before, best = best, np.full(size + 1, np.inf)
        choice = np.zeros(size + 1, dtype=np.int64)
        for end in range(group + 1, size + 1):
            total = before[group:end] + costs(end, slice(group, end))
            choice[end] = group + int(total.argmin())
            best[end] = total[choice[end] - group]
        choices.append(choice)
    begins = [size]
    for choice in reversed(choices):
        begins.append(int(choice[begins[-1]]))
    return describe(magnitudes, _entries(magnitudes, [0, *reversed(begins[1:])]))


def optimal_grouping(magnitudes: Magnitudes, groups: int, penalty: float) -> Grouping:
    """As `dynamic_grouping`, in O(groups u log u) by native code where that is there.

    The best begin of a last interval never falls as its end grows (the cost is Monge), so one comparison over all
    begins settles which of them the lower and the upper half of the ends can have. Rounding may choose another of two
    partitions that cost the same. Needs 4 groups u bytes.
    """
    module = native()
    if module is None:
        return dynamic_grouping(magnitudes, groups, penalty)
    values, counts = np.ascontiguousarray(magnitudes.values), np.ascontiguousarray(magnitudes.counts)
    begins = np.empty(min(groups, len(values)), dtype=np.int64)
    module.optimal_groups(values.ctypes.data, counts.ctypes.data, len(values), len(begins), penalty, begins.ctypes.data)
    return describe(magnitudes, _entries(magnitudes, begins))


def merge_windows(magnitudes: Magnitudes, groups: int, window: int, penalty: float) -> Grouping:
    """Algorithm 3; with a window of 1 algorithm 2, from bins where magnitudes are binned, else from single entries.

    Where there are no more windows than groups nothing is merged. Needs some 110 bytes a window.
    """
    if window == 1 and magnitudes.binned:
        begins = _entries(magnitudes, np.arange(len(magnitudes.values)))
    else:
        begins = np.arange(0, magnitudes.entries, window, dtype=np.int64)
    start = describe(magnitudes, begins)
    if len(start.begins) <= groups:
        return start
    module = native()
    if module is None:
        kept = _merge(start, groups, penalty)
    else:
        kept = np.empty(groups, dtype=np.int64)
        parts = (start.counts, start.levels, start.errors)
        module.merge_groups(*(part.ctypes.data for part in parts), len(start.begins), groups, penalty, kept.ctypes.data)
    return describe(magnitudes, start.begins[kept])


def _merge(start: Grouping, groups: int, penalty: float) -> Integers:
    """The windows that begin a group in the end; `merge_groups` of csrc/solver/grouping.cpp, step by step.

    Candidates are ordered by (merged cost, begin, end); one is stale when either of its groups has changed since.
    """
    count, mean, error = start.counts.astype(np.float64).tolist(), start.levels.tolist(), start.errors.tolist()
    size = len(count)
    end, previous = list(range(1, size + 1)), list(range(-1, size - 1))

    def merged(a: int, b: int) -> float:
        apart = mean[b] - mean[a]
        return error[a] + error[b] + count[a] * count[b] / (count[a] + count[b]) * (apart * apart)

    def candidate(a: int, b: int) -> tuple[float, int, int, int]:
        return merged(a, b) + penalty / (count[a] + count[b]), a, end[b], b

    heap = [candidate(i, i + 1) for i in range(size - 1)]
    heapq.heapify(heap)
    left = size
    while left > groups:
        _, a, last, b = heapq.heappop(heap)
        if end[a] != b or end[b] != last:
            continue
        error[a] = merged(a, b)
        mean[a] = (count[a] * mean[a] + count[b] * mean[b]) / (count[a] + count[b])
        count[a] += count[b]
        end[a], end[b] = last, 0
        if last < size:
            previous[last] = a
            heapq.heappush(heap, candidate(a, last))
        if previous[a] >= 0:
            heapq.heappush(heap, candidate(previous[a], a))
        left -= 1
    kept = [0]
    while end[kept[-1]] < size:
        kept.append(end[kept[-1]])
    return np.array(kept, dtype=np.int64)


def _entries(magnitudes: Magnitudes, distinct: Integers | list[int]) -> Integers:
    """Indices of distinct magnitudes -> the first sorted entry that has each."""
    firsts = magnitudes.counts.cumsum() - magnitudes.counts
    return np.asarray(firsts[np.asarray(distinct)], dtype=np.int64)
