"""Noise of another level in each pixel, as for inpainting and diffusion forcing."""

import numpy as np
import torch as th

from improved_diffusion.script_util import create_gaussian_diffusion


def test_per_pixel_timesteps():
    diffusion = create_gaussian_diffusion(steps=100, noise_schedule="cosine")
    f = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2  # equation 17
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.cumprod(1 - betas)

    t = th.randint(0, 100, (2, 1, 4, 4))
    t[:, :, :2] = 0  # the known half
    x, noise = th.randn(2, 3, 4, 4), th.randn(2, 3, 4, 4)
    x_t = diffusion.q_sample(x, t, noise=noise)
    a = alpha_bar[t.numpy()]
    np.testing.assert_allclose(x_t, np.sqrt(a) * x.numpy() + np.sqrt(1 - a) * noise.numpy(), rtol=1e-5, atol=1e-6)
    th.testing.assert_close(diffusion._predict_xstart_from_eps(x_t, t, noise), x, rtol=1e-3, atol=1e-3)

    losses = diffusion.training_losses(lambda x_t, t: th.zeros_like(x_t), x, t, noise=noise)
    np.testing.assert_allclose(losses["mse"], noise.square().mean(dim=(1, 2, 3)), rtol=1e-5)
