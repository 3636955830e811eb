"""The bound estimated from some timesteps: unbiased, with the variance that it reports."""

import math

import numpy as np
import pytest
import torch as th
from diffusions import diffusion_of
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import image_batch, make_diffusion, toy_model_for

from improved_diffusion.metrics.estimate import (
    draw_timesteps,
    estimate_bpd,
    importance_weights,
    log_bins,
    pilot_sums,
)
from improved_diffusion.schedules import get_named_beta_schedule

SCALE = 0.5  # standard deviation of the toy's data


def gaussian_model(diffusion):
    """The perfect prediction of x_0 for data of N(0, SCALE^2)."""
    alpha_bar = th.tensor(diffusion.alphas_cumprod)

    def model(x, t):
        a = alpha_bar[t.long()].view(-1, *[1] * (x.dim() - 1))
        return (a.sqrt() * SCALE**2 / (a * SCALE**2 + 1 - a) * x).to(x.dtype)

    return model


def gaussian_terms(diffusion, x):
    """E[L_t] of one image in closed form, t = 1 to T - 1, bits per dimension; the variances are fixed (small)."""
    a, a_prev = diffusion.alphas_cumprod[1:], diffusion.alphas_cumprod_prev[1:]
    gain = np.sqrt(a) * SCALE**2 / (a * SCALE**2 + 1 - a)  # E[x_0 | x_t] = gain * x_t
    error = (1 - gain * np.sqrt(a)) ** 2 * (x**2).mean().item() + gain**2 * (1 - a)
    coef1 = np.sqrt(a_prev) * diffusion.betas[1:] / (1 - a)
    return coef1**2 * error / (2 * diffusion.posterior_variance[1:]) / math.log(2)


@given(st.integers(1, 4000))
def test_bins_cover_all_timesteps_and_have_t_0_alone(steps):
    edges = log_bins(steps)
    assert edges[0] == 0 and edges[1] == 1 and edges[-1] == steps
    assert (np.diff(edges) > 0).all()


@given(st.data(), st.integers(2, 200), st.integers(1, 60))
def test_samples_are_systematic(data, steps, count):
    """Each timestep is drawn as often as its probability asks, up to one; and weights are the inverse of that."""
    p = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=steps, max_size=steps)))
    p /= p.sum()
    t, weights = draw_timesteps(p, count, np.array([0.01, 0.5, 0.99]))
    assert t.shape == weights.shape == (3, count)
    first = (t[0] == 0).sum() if count > 1 else 0
    rest = count - first
    for row, row_weights in zip(t, weights, strict=True):
        assert (np.diff(row) <= 0).all() and row.min() >= 0 and row.max() < steps
        drawn = np.bincount(row, minlength=steps)
        if count > 1:
            assert drawn[0] == first == min(max(1, round(count * p[0])), count - 1)
            np.testing.assert_allclose(row_weights[row == 0], 1 / first)
        expected = rest * p / (p[1:].sum() if count > 1 else 1)
        assert (np.abs(drawn - expected)[1:] < 1 + 1e-6).all()
        np.testing.assert_allclose(row_weights[row > 0], 1 / expected[row[row > 0]])


@pytest.mark.parametrize("mean", ["EPSILON", "VELOCITY"])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_with_every_timestep_drawn_once_it_is_the_whole_chains_bound(mean, var):
    """Uniform p and T evaluations: the same terms for the same noise."""
    d, x_start = make_diffusion(30, "cosine", mean, var), image_batch("bpd", 4, 3, 4, 4)
    model, noise = toy_model_for(d), [th.randn_like(x_start) for _ in range(30)]

    def noise_fn(x):
        return th.randn_like(x) if x.shape != x_start.shape else next(drawn)

    drawn = iter(noise)
    want = d.calc_bpd_loop(model, x_start, noise_fn=noise_fn)
    drawn = iter(noise)
    kwargs = dict(p=np.full(30, 1 / 30), evaluations=30, repetitions=1)
    got = estimate_bpd(d, model, x_start, noise_fn=noise_fn, **kwargs)
    assert got.keys() == {"total_bpd", "prior_bpd", "vb"}
    for key, value in got.items():
        th.testing.assert_close(value, want[key], check_dtype=False)


@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("pilot", [False, True])
def test_the_mean_over_seeds_is_the_whole_chains(steps, pilot):
    """500 seeds, within three standard errors of the closed form; and the variance that is reported is theirs."""
    d = diffusion_of(get_named_beta_schedule("cosine", steps), "START_X")
    x = image_batch("estimate", 1, 3, 4, 4) * SCALE
    model, copies, generator = gaussian_model(d), x.expand(500, -1, -1, -1), th.Generator().manual_seed(steps)

    def noise_fn(like):
        return th.empty(like.shape, dtype=like.dtype).normal_(generator=generator)

    kwargs = dict(noise_fn=noise_fn, clip_denoised=False)
    p = np.full(steps, 1 / steps)
    if pilot:
        p = importance_weights(pilot_sums(d, model, copies[:32], np.arange(32), **kwargs), steps)
    got = estimate_bpd(d, model, copies, p=p, evaluations=10, **kwargs)
    t = th.zeros(500, dtype=th.long)  # L_0 has no closed form
    decoder = th.cat(
        [
            d._vb_terms_bpd(model, copies, d.q_sample(copies, t, noise_fn(copies)), t, clip_denoised=False)["output"]
            for _ in range(20)
        ]
    )
    want = gaussian_terms(d, x).sum() + decoder.mean().item() + d._prior_bpd(x).item()
    total = got["total_bpd"]
    error = math.hypot(total.std() / 500**0.5, decoder.std() / len(decoder) ** 0.5)
    assert abs(total.mean() - want) < 3 * error
    assert got["variance"].mean().item() == pytest.approx(total.var().item(), rel=0.3)


def test_probabilities_follow_the_roots_of_the_squares():
    """Piecewise in log t, no term without a share, and t = 0 by the spread of its noise."""
    steps = 1000
    edges = log_bins(steps)
    roots = 1 / np.sqrt(edges[1:])
    spreads = np.append(9, 0 * roots[1:] + 1e-3)  # the sum of all others' is about 1
    p = importance_weights(np.stack([roots, spreads]) ** 2, steps)
    assert p.sum() == pytest.approx(1) and p.min() >= 0.001 / steps
    assert p[0] == pytest.approx(0.9, abs=0.01)
    t = np.arange(2, 700)
    ratio = p[t] * np.sqrt(t + 1)
    assert ratio.max() / ratio.min() < 1.3


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_every_timestep_has_a_share(steps):
    bins = len(log_bins(steps)) - 1
    np.testing.assert_allclose(importance_weights(np.zeros((2, bins)), steps), 1 / steps)
    p = importance_weights(np.eye(bins)[[-1, 0]], steps)
    assert p.sum() == pytest.approx(1) and p.min() >= 0.001 / steps


def test_rounding_in_the_network_does_not_move_timesteps():
    sums = np.random.default_rng(0).uniform(0.1, 1, (2, len(log_bins(1000)) - 1))
    noise = 1 + 1e-6 * np.random.default_rng(1).standard_normal(sums.shape)
    np.testing.assert_array_equal(importance_weights(sums, 1000), importance_weights(sums * noise, 1000))


def test_the_pilots_sums():
    d = diffusion_of(get_named_beta_schedule("cosine", 20), "START_X")
    x = (image_batch("estimate", 1, 3, 4, 4) * SCALE).expand(2000, -1, -1, -1)
    model = gaussian_model(d)
    squares, variances = pilot_sums(d, model, x, np.arange(2000)) / 2000
    for i in (0, 1):
        t = th.full((2000,), i)
        term = d._vb_terms_bpd(model, x, d.q_sample(x, t), t)["output"]
        assert variances[i] == pytest.approx(term.var().item(), rel=0.2)
        assert squares[i] == pytest.approx(term.square().mean().item(), rel=0.2)
