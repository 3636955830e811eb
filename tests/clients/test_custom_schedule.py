"""A schedule that ends without signal (Lin et al. 2023, arXiv 2305.08891), set on a diffusion that exists."""

import numpy as np
import torch as th

from improved_diffusion.script_util import create_gaussian_diffusion


def rescale_to_zero_terminal_snr(d):
    root = np.sqrt(np.cumprod(1 - d.betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    d.betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    d.alphas_cumprod = alpha_bar
    d.alphas_cumprod_prev = np.append(1.0, alpha_bar[:-1])
    d.sqrt_alphas_cumprod = root
    d.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - alpha_bar)
    d.posterior_variance = d.betas * (1 - d.alphas_cumprod_prev) / (1 - alpha_bar)
    d.posterior_log_variance_clipped = np.log(np.append(d.posterior_variance[1], d.posterior_variance[1:]))
    d.posterior_mean_coef1 = d.betas * np.sqrt(d.alphas_cumprod_prev) / (1 - alpha_bar)
    d.posterior_mean_coef2 = (1 - d.alphas_cumprod_prev) * np.sqrt(1 - d.betas) / (1 - alpha_bar)


def test_zero_terminal_snr():
    d = create_gaussian_diffusion(steps=50, predict_xstart=True)
    x, t, noise = th.full((2, 3), 0.5), th.tensor([49, 0]), th.randn(2, 3)
    first = d.q_sample(x, t, noise=noise)[1]
    assert (d.q_sample(x, t, noise=noise)[0] - noise[0]).abs().max() > 1e-3
    rescale_to_zero_terminal_snr(d)
    x_t = d.q_sample(x, t, noise=noise)
    assert th.equal(x_t[0], noise[0])  # no signal is left
    th.testing.assert_close(x_t[1], first)  # the first step keeps its level

    out = d.p_mean_variance(lambda x_t, t: x, x_t, t)
    assert th.equal(out["variance"][0], th.ones(3))  # beta = 1: x_{T-1} is drawn as if from the data alone
    want = np.sqrt(d.alphas_cumprod[48]) * 0.5
    np.testing.assert_allclose(out["mean"][0], want, rtol=1e-5)
    np.testing.assert_allclose(d.p_sample_loop(lambda x_t, t: x, (2, 3), device="cpu"), 0.5, rtol=1e-5)
