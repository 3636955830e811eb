"""Solvers: exact where they should be, of the right order, by the right number of evaluations."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch as th
from diffusions import MEANS, VARS, point_model
from harness import TINY, build, build_sr

from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion.inference.generate import for_inference
from improved_diffusion.respace import SpacedDiffusion, visiting
from improved_diffusion.samplers import SAMPLERS, SOLVERS, ddim, evaluations, unipc
from improved_diffusion.solvers import LAM_MIN, SPACINGS, _correct, _step, half_log_snr, solve, time_grid
from improved_diffusion.utils.errors import InputError


def diffusion(T, schedule="cosine", var_type=gd.ModelVarType.FIXED_SMALL, mean_type=gd.ModelMeanType.START_X):
    kinds = dict(model_mean_type=mean_type, model_var_type=var_type, loss_type=gd.LossType.MSE)
    return SpacedDiffusion(range(T), betas=gd.get_named_beta_schedule(schedule, T), **kinds)


class Exact:
    """A process with lam uniform in [-5, 5], whose predictions of x_0 are a given function of x_t and t."""

    lam = np.linspace(5, -5, 50_000)
    alphas_cumprod = 1 / (1 + np.exp(-2 * lam))

    def __init__(self, function):
        self.function = function

    def p_mean_variance(self, model, x, t, **kwargs):
        return {"pred_xstart": self.function(x, int(t[0]))}


def noisy_model(parts=1):
    """An untrained network's stand-in, with `parts` times x's channels."""

    def model(x, t):
        return th.cat([(3 * x + t.view(-1, *[1] * (x.dim() - 1))).sin()] * parts, dim=1)

    return model


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    "T, schedule",
    [
        (2, "cosine"),
        (10, "cosine"),
        (1000, "cosine"),
        (4000, "cosine"),
        (21, "linear"),
        (1000, "linear"),
        (4000, "linear"),
    ],
)
def test_timesteps_are_distinct_and_decrease(T, schedule):
    lam = half_log_snr(diffusion(T, schedule))
    first = int(np.flatnonzero(lam >= LAM_MIN)[-1])
    many = range(1, first + 1) if T < 1000 else [*range(1, first, 293), first - 1, first]
    for steps, spacing in itertools.product(many, SPACINGS):
        times = time_grid(lam, steps, spacing)
        assert len(times) == steps + 1 and times[0] == first and times[-1] == 0
        assert all(type(t) is int for t in times) and all(a > b for a, b in itertools.pairwise(times))
    with pytest.raises(InputError, match=rf"{first + 1}.* 1 to {first}\b"):
        time_grid(lam, first + 1)


@pytest.mark.parametrize(
    "T, schedule, first",
    [(1000, "cosine", 995), (4000, "cosine", 3983), (1000, "linear", 999), (4000, "linear", 3999)],
)
def test_the_end_of_a_cosine_schedule_has_no_signal(T, schedule, first):
    assert time_grid(half_log_snr(diffusion(T, schedule)), 10)[0] == first


def test_an_order_or_noise_out_of_range_is_refused():
    process = diffusion(8)
    for wrong in (dict(order=0), dict(order=4), dict(corrector=4), dict(eta=-1.0), dict(eta=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            solve(process, lambda x, t: x, th.zeros(1, 2), steps=3, **wrong)
    with pytest.raises(InputError, match="sampling_steps 0"):
        solve(process, lambda x, t: x, th.zeros(1, 2), steps=0)


@pytest.mark.parametrize("abar", [[0.001], [1e-6], [1e-6, 1e-7]], ids=str)
def test_a_process_without_a_step_from_noise_to_data(abar):
    """One timestep, or none with signal."""
    process = SpacedDiffusion(
        range(len(abar)),
        betas=1 - np.array(abar) / np.append(1.0, abar[:-1]),
        model_mean_type=gd.ModelMeanType.START_X,
        model_var_type=gd.ModelVarType.FIXED_LARGE,
        loss_type=gd.LossType.MSE,
    )
    for steps in (None, 1):
        with pytest.raises(InputError, match=r"^diffusion_steps \d: .* 2 timesteps"):
            solve(process, lambda x, t: x, th.zeros(1, 2), steps=steps)


def test_a_corrector_takes_no_noise():
    with pytest.raises(ValueError, match=r"eta=0\.5"):
        SAMPLERS["unipc"](diffusion(10), lambda x, t: x, th.zeros(1, 2), eta=0.5)


def test_a_spacing_that_there_is_not():
    with pytest.raises(InputError, match=r"^spacing even: .*lam.*karras.*time"):
        time_grid(half_log_snr(diffusion(10)), 2, "even")


@pytest.mark.parametrize("timesteps", [[], [3, 3], [1, 2], [10], [2, -1]], ids=str)
def test_timesteps_that_do_not_fit(timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        solve(diffusion(10), lambda x, t: x, th.zeros(1, 2), order=1, timesteps=timesteps)


# ---------------------------------------------------------------- against the chain


@pytest.mark.parametrize("var_type", [gd.ModelVarType.FIXED_LARGE, gd.ModelVarType.LEARNED_RANGE])
@pytest.mark.parametrize("clip", [False, True])
def test_order_1_is_ddim(var_type, clip):
    process = diffusion(100, var_type=var_type, mean_type=gd.ModelMeanType.EPSILON)
    model = noisy_model(2 if var_type == gd.ModelVarType.LEARNED_RANGE else 1)
    x_T, times = th.randn(3, 2, 4), [95, 60, 30, 12, 3, 0]
    want = ddim(process, model, x_T, timesteps=times, clip_denoised=clip)
    got = solve(process, model, x_T, order=1, timesteps=times, clip_denoised=clip)
    th.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_order_1_with_noise_is_the_ancestral_step():
    process, times = diffusion(100), [80, 40, 15, 2]
    lam, chain = half_log_snr(process), visiting(process, times)
    x, m = th.randn(5, 3, dtype=th.float64), th.randn(5, 3, dtype=th.float64)
    for i in range(3):
        t = th.full((5,), 3 - i)
        mean, variance, _ = chain.q_posterior_mean_variance(m, x, t)
        lam_i, lam_n = lam[times[i]], lam[times[i + 1]]
        th.testing.assert_close(_step(x, [m], [lam_i], lam_n, 1.0, False), mean.double(), rtol=1e-5, atol=1e-5)
        sigma = 1 / (1 + math.exp(2 * lam_n))
        assert -sigma * math.expm1(-2 * (lam_n - lam_i)) == pytest.approx(variance[0, 0].item(), rel=1e-5)


# ---------------------------------------------------------------- against the integral


def integral(polynomial, lam_0, lam_n, eta):
    """x_n of x_0 = 0 where the prediction is a polynomial of lam, by quadrature; without the terms of noise."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    lam = lam_0 + (nodes + 1) / 2 * (lam_n - lam_0)
    values = (1 + eta) * np.exp(-(1 + eta) * (lam_n - lam)) * polynomial(lam)
    return (lam_n - lam_0) / 2 * (weights * values).sum() / math.sqrt(1 + math.exp(-2 * lam_n))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_polynomial_of_lower_degree_is_integrated_exactly(order, eta):
    polynomial = np.polynomial.Polynomial([0.3, -0.7, 0.2][:order])
    lams, lam_n = [-0.4, -1.1, -1.5], 0.5
    history = [th.tensor([polynomial(lam)], dtype=th.float64) for lam in lams[:order]]
    got = _step(th.zeros(1, dtype=th.float64), history, lams, lam_n, eta, exact=True)
    assert got.item() == pytest.approx(integral(polynomial, lams[0], lam_n, eta), abs=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_corrector_is_exact_for_a_degree_more(order):
    polynomial = np.polynomial.Polynomial([0.3, -0.7, 0.2, 0.1][: order + 1])
    lams, lam_n = [-0.4, -1.1, -1.5], 0.5
    history = [th.tensor([polynomial(lam)], dtype=th.float64) for lam in lams[:order]]
    new = th.tensor([polynomial(lam_n)], dtype=th.float64)
    got = _correct(th.zeros(1, dtype=th.float64), new, history, lams, lam_n)
    assert got.item() == pytest.approx(integral(polynomial, lams[0], lam_n, 0), abs=1e-12)


def posterior_mean(weights, means, deviations):
    """E[x_0 | x_t] of a mixture of normal distributions."""
    w, mu, sd = (th.tensor(v, dtype=th.float64) for v in (weights, means, deviations))

    def predict(x, t, abar):
        a, s2 = math.sqrt(abar[t]), 1 - abar[t]
        variance = (a * sd) ** 2 + s2
        share = (w.log() - variance.log() / 2 - (x[..., None] - a * mu) ** 2 / (2 * variance)).softmax(-1)
        return (share * (mu + a * sd**2 / variance * (x[..., None] - a * mu))).sum(-1)

    return predict


@pytest.mark.parametrize(
    "kwargs, order",
    [
        (dict(order=1), 0.95),
        (dict(order=2), 1.99),
        (dict(order=3), 2.1),
        (dict(order=3, exact=True), 3.1),
        (dict(order=2, corrector=2), 2.9),
    ],
    ids=str,
)
def test_observed_orders(kwargs, order):
    mixture = posterior_mean([0.3, 0.5, 0.2], [-0.7, 0.1, 0.8], [0.15, 0.2, 0.1])
    process = Exact(functools.partial(mixture, abar=Exact.alphas_cumprod))
    x_T = th.linspace(-2, 2, 9, dtype=th.float64)
    want = solve(process, None, x_T, order=3, exact=True, steps=1280)
    errors = [(solve(process, None, x_T, steps=steps, **kwargs) - want).abs().mean().item() for steps in (160, 320)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


# ---------------------------------------------------------------- whole chains


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_constant_prediction_is_exact_but_for_the_noise_that_is_left(name, steps):
    process, x_T = diffusion(1000), th.randn(4, 3, 2)
    lam, value = half_log_snr(process), th.linspace(-1, 1, 24).view(4, 3, 2)
    sample = SAMPLERS[name](process, lambda x, t: value, x_T, steps=steps, noise_fn=th.zeros_like)
    times = time_grid(lam, steps)
    a, s = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
    shrunk = math.exp(-(lam[0] - lam[times[0]])) if name.endswith("sde") else 1.0
    ratio = s[0] / s[times[0]] * shrunk
    E = 1 - ratio * (a[times[0]] / a[0])
    want = ratio * x_T + a[0] * E * value
    th.testing.assert_close(sample, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_model_is_called_once_a_step(name, steps):
    process, called, seen = diffusion(1000), [], []

    def model(x, t):
        called.append(t.tolist())
        return x.tanh()

    SAMPLERS[name](process, model, th.randn(2, 3), steps=steps, callback=seen.append)
    assert len(called) == evaluations(name, process, steps) == steps
    times = time_grid(half_log_snr(process), steps)[:-1]
    assert called == [[t, t] for t in times]
    assert [(row["i"], row["t"]) for row in seen] == list(enumerate(times))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rescale", [False, True])
def test_finite_for_an_untrained_network(name, rescale):
    process = diffusion(4000, var_type=gd.ModelVarType.LEARNED_RANGE, mean_type=gd.ModelMeanType.EPSILON)
    process.rescale_timesteps = rescale
    for steps in (5, 20, 100):
        sample = SAMPLERS[name](process, noisy_model(2), th.randn(2, 3, 4, 4), steps=steps)
        assert sample.isfinite().all() and sample.abs().max() < 2


@pytest.mark.parametrize("name", SOLVERS)
def test_moments_of_known_distributions(name):
    """20 evaluations leave the data's mean and variance, and the noise of t = 0."""
    process = diffusion(1000)
    left = 1 - process.alphas_cumprod[0]
    for weights, means, deviations in [([1.0], [0.3], [0.2]), ([0.7, 0.3], [-0.5, 0.5], [1e-3, 1e-3])]:
        mixture = posterior_mean(weights, means, deviations)
        x_T = th.randn(20000, dtype=th.float64)[:, None]

        def model(x, t, mixture=mixture):
            return mixture(x, int(t[0]), process.alphas_cumprod)

        sample = SAMPLERS[name](process, model, x_T, steps=20)
        mean = np.dot(weights, means)
        variance = np.dot(weights, np.square(means) + np.square(deviations)) - mean**2 + left
        assert sample.mean().item() == pytest.approx(mean, abs=0.02)
        assert sample.var().item() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 4), (2, 3, 2, 2, 2)], ids=str)
def test_any_shape(shape, name):
    """The axes are independent: a sample of any shape is that of its values."""
    process, x_T = diffusion(50), th.randn(shape)
    sample = SAMPLERS[name](process, lambda x, t: x.tanh(), x_T, steps=8, noise_fn=th.ones_like)
    flat = SAMPLERS[name](process, lambda x, t: x.tanh(), x_T.flatten(1), steps=8, noise_fn=th.ones_like)
    assert sample.shape == shape
    th.testing.assert_close(sample.flatten(1), flat)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_perfect_model_of_a_point_draws_that_point(mean, var, name):
    """Whatever it predicts, with fixed and with learned variances; the noise of t = 0 is left."""
    process = diffusion(200, var_type=gd.ModelVarType[var], mean_type=gd.ModelMeanType[mean])
    x_start = th.linspace(-0.9, 0.9, 24).view(2, 3, 4)
    sample = SAMPLERS[name](process, point_model(process, x_start), th.randn(2, 3, 4), steps=10)
    left = process.sqrt_one_minus_alphas_cumprod[0]
    assert (sample - process.sqrt_alphas_cumprod[0] * x_start).abs().max() < 5 * left


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
@pytest.mark.parametrize("name", SOLVERS)
def test_arithmetic_is_float32_for_a_network_in_half_precision(name, dtype):
    """Where it answers in it: as if its answer were float32, to float32's precision."""

    def half(x, t):
        return (x.tanh() * 0.9).to(dtype)

    process, x_T = diffusion(1000), th.randn(2, 3, 4)
    samples = [
        SAMPLERS[name](process, model, x_T, steps=20, noise_fn=th.ones_like)
        for model in (half, lambda x, t: half(x, t).float())
    ]
    assert samples[0].dtype == th.float32
    th.testing.assert_close(*samples, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind, precision",
    [
        *itertools.product(["classes", "super-resolution"], [dict(use_fp16=True), dict(use_bf16=True)]),
        ("super-resolution", dict(compile=True)),
    ],
    ids=str,
)
def test_networks_of_both_kinds_in_any_precision(kind, precision, monkeypatch):
    """Class-conditional and super-resolution, of learned variance: near the samples in float32."""
    monkeypatch.setattr(th.nn.Module, "compile", functools.partialmethod(th.nn.Module.compile, backend="eager"))
    common = dict(TINY, class_cond=True, num_classes=4, learn_sigma=True)
    samples = []
    for chosen in ({}, precision):
        th.manual_seed(0)
        if kind == "classes":
            model, process = build(image_size=8, **common)
        else:
            model, process = build_sr(large_size=8, small_size=4, **common)
        for p in model.parameters():
            th.nn.init.normal_(p, std=0.03)
        kwargs = {"y": th.tensor([1, 3])} | ({"low_res": th.randn(2, 3, 4, 4)} if kind != "classes" else {})
        called = for_inference(model, batch_size=2, **chosen)
        samples.append(unipc(process, called, th.randn(2, 3, 8, 8), steps=3, model_kwargs=kwargs))
    assert samples[1].dtype == th.float32 and samples[1].isfinite().all()
    assert (samples[1] - samples[0]).abs().max() < (1e-4 if "compile" in precision else 0.1)


def test_a_clamped_prediction_enters_the_history():
    seen = []
    solve(diffusion(100), lambda x, t: 5 * x, th.randn(2, 3), order=2, steps=6, callback=seen.append)
    assert max(row["pred_xstart"].abs().max() for row in seen) == 1
