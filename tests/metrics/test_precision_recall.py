"""Precision and recall in examples that can be counted by hand."""

import pytest
import torch as th

from improved_diffusion.metrics import precision_recall
from improved_diffusion.utils.errors import InputError


def line(*x):
    return th.tensor(x, dtype=th.float64)[:, None]


def features(n, seed=0, d=5):
    return th.randn(n, d, generator=th.Generator().manual_seed(seed))


def test_counted_by_hand():
    """With k = 1 the balls of the reference have the radii 1, 1, 9, those of the samples 2, 2, 26."""
    samples, reference = line(2, 4, 30), line(0, 1, 10)
    # 2 is at the border of 1's ball, which is within, and 4 in 10's; 0 and 1 are in 2's, and 10 in 30's
    assert precision_recall(samples, reference, k=1) == (pytest.approx(2 / 3), 1)


def test_the_neighbour_itself_is_excluded():
    """The third neighbour of each of five points a step apart is at most 3 away."""
    reference = line(0, 1, 2, 3, 4)
    assert precision_recall(line(7, 7, 7, 7), reference) == (1, 0)  # the ball of 4 reaches to 7
    assert precision_recall(line(7.5, 7, 7, 7), reference)[0] == 0.75


@pytest.mark.parametrize("scale", [1, 1e3])
def test_equal_sets_and_repeated_images(scale):
    x = features(20) * scale + 100
    assert precision_recall(x, x.flip(0)) == (1, 1)
    repeated = x[:1].expand(6, -1)
    assert precision_recall(repeated, repeated) == (1, 1)
    assert precision_recall(repeated, x) == (1, 1 / 20)


def test_far_sets():
    assert precision_recall(features(20), features(20, seed=1) + 50) == (0, 0)


def test_samples_of_a_part_of_the_reference_are_precise_and_recall_that_part():
    near, far = features(50), features(50, seed=1) + 100
    precision, recall = precision_recall(features(50, seed=2) * 0.5, th.cat([near, far]))
    assert precision == 1 and recall <= 0.5


def test_chunks_change_nothing(monkeypatch):
    a, b = features(40), features(33, seed=1)
    want = precision_recall(a, b)
    monkeypatch.setitem(precision_recall.__globals__, "CHUNK", 7)
    assert precision_recall(a, b) == want
    assert precision_recall(a[th.randperm(40)], b.numpy()) == want


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (features(3), features(9), "3"),
        (features(9, d=2), features(9), "2"),
        (features(9) * th.inf, features(9), "finite"),
    ],
)
def test_sets_without_manifolds(a, b, named):
    with pytest.raises(InputError, match=named):
        precision_recall(a, b)
