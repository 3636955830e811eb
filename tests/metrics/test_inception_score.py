"""The Inception score in closed form."""

import pytest
import torch as th

from improved_diffusion.metrics.inception_score import inception_score
from improved_diffusion.utils.errors import InputError


def test_certain_and_diverse_is_the_number_of_classes():
    assert inception_score(th.eye(10).repeat(5, 1) * 1000) == pytest.approx(10)


def test_uncertain_or_alike_is_1():
    assert inception_score(th.zeros(7, 10)) == pytest.approx(1)
    assert inception_score(th.tensor([[5.0, 1.0]]).expand(7, 2)) == pytest.approx(1)


def test_the_mean_of_splits():
    first, second = th.eye(4) * 1000, th.zeros(2, 4)
    assert inception_score(th.cat([first, second]), split=4) == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("logits", [th.zeros(0, 3), th.zeros(3), th.full((2, 2), th.nan)])
def test_no_logits(logits):
    with pytest.raises(InputError):
        inception_score(logits)
