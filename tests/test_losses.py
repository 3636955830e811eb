"""The terms of the variational bound: KL between Gaussians, likelihood of 8-bit values."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import assert_recorded, image_batch, tensor

from improved_diffusion.losses import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl

SHAPE = (4, 3, 5, 5)
PIXELS = th.arange(256, dtype=th.float64) / 127.5 - 1

means = st.floats(-10, 10)
log_variances = st.floats(-8, 8)


def doubles(*values):
    return [th.tensor(v, dtype=th.float64) for v in values]


def test_recorded_answers():
    a, b, c, d = (tensor(name, *SHAPE, scale=0.7) for name in "abcd")
    x = image_batch("dgl", *SHAPE)
    assert_recorded("losses/kl", normal_kl(a, b, c, d))
    assert_recorded("losses/kl_scalar", normal_kl(a, b, 0.0, 0.3))
    assert_recorded("losses/kl_scalar_first", normal_kl(0.1, -0.2, a, b))
    assert_recorded("losses/cdf", approx_standard_normal_cdf(a * 3))
    assert_recorded("losses/dgl", discretized_gaussian_log_likelihood(x, means=a, log_scales=b - 2))
    assert_recorded(
        "losses/dgl_tight", discretized_gaussian_log_likelihood(x, means=x + 0.001 * a, log_scales=0 * b - 6)
    )


# ---------------------------------------------------------------- KL


@given(means, log_variances, means, log_variances)
def test_kl_is_never_negative(mean1, logvar1, mean2, logvar2):
    assert normal_kl(*doubles(mean1, logvar1, mean2, logvar2)) >= -1e-12


@given(means, log_variances)
def test_kl_of_equal_gaussians_is_zero(mean, log_variance):
    assert normal_kl(*doubles(mean, log_variance, mean, log_variance)).item() == pytest.approx(0, abs=1e-12)


@given(means, log_variances, means, log_variances)
def test_kl_agrees_with_torch_distributions(mean1, logvar1, mean2, logvar2):
    mean1, logvar1, mean2, logvar2 = doubles(mean1, logvar1, mean2, logvar2)
    normals = [th.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean1, logvar1), (mean2, logvar2))]
    want = th.distributions.kl_divergence(*normals)
    th.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("position", range(4))
def test_kl_broadcasts_numbers_against_a_tensor_in_any_place(position):
    numbers = [0.4, -0.2, 0.1, 0.3]
    mixed = list(numbers)
    mixed[position] = th.full((2, 3), numbers[position])
    want = normal_kl(*(th.full((2, 3), v) for v in numbers))
    th.testing.assert_close(normal_kl(*mixed), want)


def test_kl_keeps_the_dtype_of_its_tensors():
    assert normal_kl(th.zeros(2, dtype=th.float64), 0.0, 1.0, 0.0).dtype == th.float64


def test_kl_of_numbers_alone_is_refused():
    with pytest.raises(TypeError, match="tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


# ---------------------------------------------------------------- cumulative distribution


def test_cdf_is_near_the_exact_one():
    x = th.linspace(-6, 6, 1001, dtype=th.float64)
    exact = 0.5 * (1 + th.erf(x / math.sqrt(2)))
    error = (approx_standard_normal_cdf(x) - exact).abs().max()
    assert 1e-5 < error < 5e-4  # an approximation it stays: published likelihoods rest on it


@given(st.floats(-30, 30), st.floats(0, 1))
def test_cdf_rises_and_is_symmetric(x, step):
    here, there, mirrored = approx_standard_normal_cdf(th.tensor([x, x + step, -x], dtype=th.float64))
    assert there >= here
    assert (here + mirrored).item() == pytest.approx(1)


# ---------------------------------------------------------------- likelihood of 8-bit values


@given(st.floats(-1.5, 1.5), st.floats(-7, 2))
def test_the_256_bins_sum_to_one(mean, log_scale):
    log_p = discretized_gaussian_log_likelihood(
        PIXELS, means=th.full_like(PIXELS, mean), log_scales=th.full_like(PIXELS, log_scale)
    )
    assert (log_p <= 0).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@given(st.integers(0, 255))
def test_the_bin_of_the_mean_is_the_likeliest(k):
    means = PIXELS[k].expand(256)
    log_p = discretized_gaussian_log_likelihood(PIXELS, means=means, log_scales=th.full_like(means, -6.0))
    assert log_p.argmax() == k


def test_a_tight_gaussian_is_sure_of_its_own_bin():
    log_p = discretized_gaussian_log_likelihood(PIXELS, means=PIXELS, log_scales=th.full_like(PIXELS, -9.0))
    th.testing.assert_close(log_p, th.zeros_like(PIXELS), rtol=0, atol=1e-6)


def test_a_wide_gaussian_has_the_density_times_the_bin_width_inside():
    inner = PIXELS[1:-1]
    log_p = discretized_gaussian_log_likelihood(inner, means=0 * inner, log_scales=0 * inner)
    want = th.distributions.Normal(0.0, 1.0).log_prob(inner) + math.log(2 / 255)
    th.testing.assert_close(log_p, want, rtol=0, atol=5e-3)


@pytest.mark.parametrize("log_scale", [-12.0, -3.0, 5.0])
def test_values_far_from_the_mean_stay_finite_with_their_gradients(log_scale):
    x = th.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    means = th.tensor([9.0, 9.0, -9.0, 9.0, -9.0], requires_grad=True)
    log_scales = th.full((5,), log_scale, requires_grad=True)
    log_p = discretized_gaussian_log_likelihood(x, means=means, log_scales=log_scales)
    log_p.sum().backward()
    for v in (log_p, means.grad, log_scales.grad):
        assert v.isfinite().all()
    assert (log_p >= math.log(1e-12) - 1e-3).all()


@pytest.mark.parametrize("wrong", ["means", "log_scales"])
def test_shapes_must_agree(wrong):
    shapes = {"means": (2, 3), "log_scales": (2, 3)} | {wrong: (2, 1)}
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        discretized_gaussian_log_likelihood(th.zeros(2, 3), **{k: th.zeros(s) for k, s in shapes.items()})


def test_bins_are_those_of_8_bit_images():
    """Two neighbouring values share the edge between their bins, 1/255 from both."""
    np.testing.assert_allclose((PIXELS[:-1] + 1 / 255).numpy(), (PIXELS[1:] - 1 / 255).numpy(), atol=1e-15)
