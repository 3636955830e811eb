"""The kernel distance against sums written out, and its subsets."""

import numpy as np
import pytest
import torch as th

from improved_diffusion.metrics import kernel_distance
from improved_diffusion.utils.errors import InputError


def features(n=30, d=4, seed=0, shift=0.0):
    return th.randn(n, d, generator=th.Generator().manual_seed(seed), dtype=th.float64) + shift


def written_out(a, b):
    def k(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    m = len(a)
    within = [sum(k(s[i], s[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1)) for s in (a, b)]
    return sum(within) - 2 * sum(k(x, y) for x in a for y in b) / m**2


def test_the_unbiased_estimate_of_the_whole_sets():
    a, b = features(8), features(8, seed=1, shift=0.5)
    mean, std = kernel_distance(a, b, subsets=2, subset_size=8)
    assert (mean, std) == (pytest.approx(written_out(a, b), rel=1e-12), pytest.approx(0, abs=1e-12))


def test_point_masses():
    """For x = 0 and y = 1 in one dimension: k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1."""
    mean, std = kernel_distance(th.zeros(10, 1), th.ones(12, 1))
    assert (mean, std) == (pytest.approx(1 + 8 - 2), 0)


def test_sets_of_one_distribution_have_distance_zero_in_the_mean():
    mean, std = kernel_distance(features(400), features(400, seed=1))
    assert abs(mean) < std
    far, _ = kernel_distance(features(400), features(400, seed=1, shift=1.0))
    assert far > 20 * std


def test_order_and_types_change_nothing_beyond_the_choice_of_subsets():
    a, b = features(40), features(40, seed=1, shift=0.3)
    want, _ = kernel_distance(a, b, subset_size=40)
    assert kernel_distance(a.flip(0).float(), b.numpy(), subset_size=40)[0] == pytest.approx(want, rel=1e-5)
    halves, std = kernel_distance(a, b)
    assert std > 0
    assert kernel_distance(a.flip(0), b.flip(0))[0] == pytest.approx(halves, abs=3 * std)


def test_global_generators_are_neither_used_nor_changed():
    before = th.get_rng_state(), np.random.get_state()[1].copy()
    first = kernel_distance(features(), features(seed=1))
    assert th.equal(before[0], th.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    np.random.seed(1)
    assert kernel_distance(features(), features(seed=1)) == first
    assert kernel_distance(features(), features(seed=1), seed=1) != first


@pytest.mark.parametrize(
    ("a", "b", "size", "named"),
    [
        (features(d=3), features(d=4), None, "3"),
        (features(n=1), features(), None, "1"),
        (th.zeros(3), features(), None, "(3,)"),
        (features() * th.nan, features(), None, "finite"),
        (features(n=9), features(), 10, "10"),
    ],
)
def test_sets_without_a_distance(a, b, size, named):
    with pytest.raises(InputError, match=named.replace("(", r"\(").replace(")", r"\)")):
        kernel_distance(a, b, subset_size=size)
