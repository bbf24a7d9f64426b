"""Numbers of two versions are equal only where both are there."""

import math

import pytest

from tests.tools.compat import largest_difference


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ([0.5, 0.25], 0.0),
        ([0.5, 0.75], 0.5),
        ([0.5, math.nan], math.inf),
        ([0.5, math.inf], math.inf),
        ([0.5], math.inf),
        ([], math.inf),
    ],
)
def test_a_number_that_is_missing_or_not_finite_differs_infinitely(other, difference):
    assert largest_difference([0.5, 0.25], other) == difference
    assert largest_difference(other, [0.5, 0.25]) == difference


def test_two_answers_without_numbers_are_not_equal():
    assert largest_difference([], []) == math.inf
    assert largest_difference([math.nan], [math.nan]) == math.inf
