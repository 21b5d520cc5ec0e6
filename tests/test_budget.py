"""Choosing one option of every group under a limit, against trying all."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ggufx.budget import choose
from ggufx.errors import PlanError

Groups = list[list[tuple[int, float]]]


def bill(groups: Groups, chosen: list[int]) -> tuple[int, float]:
    """Bytes and cost of a choice."""
    taken = [options[number] for options, number in zip(groups, chosen, strict=True)]
    return sum(nbytes for nbytes, _ in taken), sum(cost for _, cost in taken)


def random_groups(rng: np.random.Generator) -> Groups:
    """A few groups of a few options, beaten ones and equal sizes among them."""
    return [
        [(int(rng.integers(1, 40)), float(rng.random())) for _ in range(rng.integers(1, 6))]
        for _ in range(rng.integers(1, 6))
    ]


def test_a_choice_is_the_best_or_dearer_by_less_than_one_step() -> None:
    rng = np.random.default_rng(0)
    best_found = 0
    for _ in range(200):
        groups = random_groups(rng)
        low, high = (sum(pick(options)[0] for options in groups) for pick in (min, max))
        limit = int(rng.integers(low, high + 2))
        nbytes, cost = bill(groups, choose(groups, limit))
        assert nbytes <= limit
        affordable = (bill(groups, list(numbers)) for numbers in product(*(range(len(o)) for o in groups)))
        best = min(cost for size, cost in affordable if size <= limit)
        step = max(max(cost for _, cost in options) - min(cost for _, cost in options) for options in groups)
        assert best <= cost + 1e-12
        assert cost <= best + step
        best_found += cost <= best + 1e-12
    # Exchanges of two leave little: what is lost with them is a third kind of move.
    assert best_found >= 190


def test_many_groups_fill_the_limit_and_cost_less_than_any_one_type() -> None:
    rng = np.random.default_rng(1)
    bits = np.array([2.0625, 2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5])
    weights = rng.integers(1, 50, 1000) * 4096
    scale = rng.lognormal(0, 1, 1000)
    groups = [
        [(int(n * b / 8), float(s * 4.0**-b)) for b in bits] for n, s in zip(weights, scale, strict=True)
    ]  # fmt: skip
    for number in range(1, len(bits) - 1):
        limit, uniform = bill(groups, [number] * len(groups))
        nbytes, cost = bill(groups, choose(groups, limit))
        assert 0.9999 * limit < nbytes <= limit
        assert cost < uniform


def test_ends_of_the_range() -> None:
    groups: Groups = [[(10, 1.0), (20, 0.5), (20, 0.6)], [(5, 0.1)], [(7, 0.3), (8, 0.3), (9, 0.0)]]
    assert choose(groups, 22) == [0, 0, 0]
    assert choose(groups, 10**9) == [1, 0, 2]
    assert choose([], 0) == []
    with pytest.raises(PlanError, match="the smallest options take 22 bytes, more than 21"):
        choose(groups, 21)
