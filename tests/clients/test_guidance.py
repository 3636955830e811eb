"""Classifier guidance by an override of p_sample, for a classifier whose gradient is known."""

import numpy as np
import torch as th
from diffusions import point_model

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)

GOAL, SCALE = 0.5, 3.0


class Guided(GaussianDiffusion):
    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        with th.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_p = -0.5 * ((x_in - GOAL) ** 2).sum()  # of a Gaussian around the goal
            gradient = th.autograd.grad(log_p, x_in)[0] * SCALE
        mean = out["mean"] + out["variance"] * gradient
        mask = (t != 0).float().view(-1, *([1] * (x.dim() - 1)))
        return {"sample": mean + mask * th.exp(0.5 * out["log_variance"]) * th.randn_like(x), **out}


def test_guidance():
    guided, plain = (
        cls(
            betas=get_named_beta_schedule("cosine", 8),
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )
        for cls in (Guided, GaussianDiffusion)
    )
    model = point_model(plain, th.full((2, 3), -0.25))

    # one step moves the mean by variance * scale * (goal - x)
    x, t = th.randn(2, 3), th.tensor([5, 5])
    samples = []
    for d in (guided, plain):
        th.manual_seed(1)
        samples.append(d.p_sample(model, x, t)["sample"])
    want = plain.posterior_variance[5] * SCALE * (GOAL - x)
    th.testing.assert_close(samples[0] - samples[1], want.float(), rtol=1e-4, atol=1e-6)

    # the loops call the override; the last step has no variance and ends at the data
    final = guided.p_sample_loop(model, (2, 3), device="cpu")
    np.testing.assert_allclose(final.numpy(), -0.25, atol=1e-3)
