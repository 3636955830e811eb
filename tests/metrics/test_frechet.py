"""The Fréchet distance against closed forms, and moments that arrive in batches."""

import math

import numpy as np
import pytest
import torch as th

from improved_diffusion.metrics import Moments, frechet_distance
from improved_diffusion.utils.errors import InputError


def features(n=50, d=6, seed=0):
    generator = th.Generator().manual_seed(seed)
    return th.randn(n, d, generator=generator, dtype=th.float64) @ th.randn(d, d, generator=generator).double() + 1


def covariance(d, seed):
    return features(3 * d, d, seed).T.cov()


# ---------------------------------------------------------------- closed forms


def test_two_normal_distributions_with_one_covariance_are_their_means_apart():
    cov = covariance(6, 0)
    assert frechet_distance((th.zeros(6), cov), (th.full((6,), 0.5), cov)) == pytest.approx(6 * 0.25, abs=1e-10)


def test_covariances_that_commute():
    """|m1 - m2|^2 + sum (s1 - s2)^2 in their common axes."""
    axes = th.linalg.qr(features(6, 6)).Q
    s1, s2 = th.tensor([1.0, 2, 3, 0, 1, 0]).double(), th.tensor([2.0, 2, 1, 1, 0, 0]).double()
    a, b = (axes * s**2 @ axes.T for s in (s1, s2))
    mean = th.arange(6.0)
    want = (s1 - s2).square().sum() + mean.square().sum()
    # 1e-6: the root of the rounding error of an eigenvalue 0
    assert frechet_distance((mean, a), (0 * mean, b)) == pytest.approx(want.item(), abs=1e-6)


def test_one_dimension():
    assert frechet_distance((th.tensor([1.0]), th.tensor([[4.0]])), (np.array([3.0]), np.array([[25.0]]))) == (
        pytest.approx(2**2 + (2 - 5) ** 2)
    )


def test_covariances_that_do_not_commute():
    """By the eigenvalues of C1 C2; in two dimensions tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt det C1 C2)."""
    a, b = covariance(2, 1), covariance(2, 2)
    assert not th.allclose(a @ b, b @ a)
    root = math.sqrt((a @ b).trace() + 2 * math.sqrt(th.linalg.det(a @ b)))
    got = frechet_distance((th.zeros(2), a), (th.zeros(2), b))
    assert got == pytest.approx((a.trace() + b.trace()).item() - 2 * root, abs=1e-10)
    a, b = covariance(20, 1), covariance(20, 2)
    roots = np.sqrt(np.linalg.eigvals((a @ b).numpy()).real)
    got = frechet_distance((th.zeros(20), a), (th.zeros(20), b))
    assert got == pytest.approx((a.trace() + b.trace()).item() - 2 * roots.sum(), rel=1e-10)


@pytest.mark.parametrize("n", [5, 6, 50, 500])
def test_equal_sets_are_at_no_distance(n):
    """Of fewer features than dimensions too, where the covariance is singular."""
    x = features(n, 40)
    assert frechet_distance(x, x.clone()) == pytest.approx(0, abs=1e-8 * x.T.cov().trace().item())


@pytest.mark.parametrize("n", [5, 50])
def test_a_shifted_set_is_at_the_square_of_the_shift(n):
    x, d = features(n), th.linspace(-1, 1, 6).double()
    assert frechet_distance(x, x + d) == pytest.approx(d.square().sum().item(), abs=1e-8)


def test_samples_come_near_their_distributions_distance():
    a, b = (th.randn(100_000, 3, generator=th.Generator().manual_seed(i)) for i in range(2))
    assert frechet_distance(a, 2 * b + 1) == pytest.approx(3 * (1 + 1), rel=0.02)


# ---------------------------------------------------------------- what changes nothing


def test_the_order_of_features_changes_nothing_and_the_distance_is_symmetric():
    a, b = features(), features(40, seed=1)
    want = frechet_distance(a, b)
    assert want > 0.1
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(a.flip(0), b[th.randperm(40)]) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(a[:, [3, 1, 0, 2, 5, 4]], b[:, [3, 1, 0, 2, 5, 4]]) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("of", [th.Tensor.numpy, lambda x: x.clone().requires_grad_()])
def test_arrays_and_tensors(of):
    a, b = features(), features(seed=1)
    assert frechet_distance(of(a), of(b)) == frechet_distance(a, b)


def test_integers_are_features_too():
    x = (100 * features().abs()).to(th.uint8)
    assert frechet_distance(x, x.float() + 300) == pytest.approx(6 * 300**2)


def test_features_their_moments_and_their_mean_with_covariance_are_the_same():
    a, b = features(), features(seed=1)
    moments = Moments()
    moments.update(a)
    want = frechet_distance(a, b)
    assert frechet_distance(moments, b) == want
    assert frechet_distance((a.mean(0), a.T.cov()), (b.mean(0), b.T.cov())) == pytest.approx(want, rel=1e-10)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 0, 40, 3], [0, 49, 1]], ids=str)
def test_batches_change_nothing(sizes):
    x, moments = features() + 1e6, Moments()  # far from 0, where E[x x^T] - m m^T would lose its digits
    for batch in x.split(sizes):
        moments.update(batch)
    assert moments.count == 50
    th.testing.assert_close(moments.mean, x.mean(0), rtol=1e-14, atol=0)
    th.testing.assert_close(moments.covariance(), x.T.cov(), rtol=1e-8, atol=1e-8)


def test_memory_does_not_grow():
    moments = Moments()
    for _ in range(3):
        moments.update(features())
        assert sum(v.numel() for v in vars(moments).values() if isinstance(v, th.Tensor)) == 6 + 36


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "a, named",
    [
        (th.zeros(1, 6), "^1 features: .* 2"),
        (th.zeros(0, 6), "^0 features: .* 2"),
        (th.zeros(6), r"\(6,\)"),
        (th.zeros(5, 3, 2), r"\(5, 3, 2\)"),
        (th.zeros(5, 4), "4 and of 6"),
        (th.full((5, 6), math.nan), "finite"),
        ((th.zeros(6), th.eye(5)), r"\(6,\).*\(5, 5\)"),
        ((th.zeros(6), th.full((6, 6), math.inf)), "finite"),
    ],
    ids=str,
)
def test_what_has_no_distance(a, named):
    with pytest.raises(InputError, match=named):
        frechet_distance(a, features())


def test_batches_of_other_dimensions():
    moments = Moments()
    moments.update(features())
    with pytest.raises(InputError, match=r"4 .* 6"):
        moments.update(th.zeros(3, 4))


def test_merged_moments_are_those_of_all():
    whole, parts = Moments(), [Moments() for _ in range(3)]
    whole.update(features(50))
    for part, chunk in zip(parts, features(50).split([30, 1, 19]), strict=True):
        part.update(chunk)
    merged = Moments()
    for part in [Moments(), *parts, Moments()]:
        merged.merge(part)
    assert merged.count == 50
    assert th.allclose(merged.mean, whole.mean, atol=1e-13) and th.allclose(merged.scatter, whole.scatter, atol=1e-11)
    with pytest.raises(InputError, match="6"):
        merged.merge(_moments(features(4, d=3)))


def _moments(x):
    moments = Moments()
    moments.update(x)
    return moments
