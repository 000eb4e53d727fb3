"""The Pareto front of a comparison: in the figure, and marked in the table."""

from __future__ import annotations

import random

from bitwright.report.figures import pareto_front


def test_equal_points_are_on_it_together() -> None:
    assert pareto_front([(2.7986, 35.116), (2.7986, 35.116), (2.61, 41.2)]) == [2, 0, 1]
    assert pareto_front([(3.0, 9.0), (2.0, 8.0), (3.0, 9.0), (3.0, 7.0)]) == [1, 3]
    assert pareto_front([(2.0, 8.0), (3.0, 8.0), (2.0, 9.0)]) == [0]
    assert pareto_front([]) == []


def test_it_is_what_nothing_beats() -> None:
    rng = random.Random(0)
    for _ in range(200):
        points = [(float(rng.randint(1, 5)), float(rng.randint(1, 5))) for _ in range(rng.randint(1, 12))]
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        front = pareto_front(points)
        assert sorted(front) == [index for index, point in enumerate(points) if point in best]
        assert [points[index] for index in front] == sorted(points[index] for index in front)
