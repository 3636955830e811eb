"""A module of a fork that takes everything by star imports, the modules that the original imports too."""

import numpy as np
import torch

FORK = """
from improved_diffusion.gaussian_diffusion import *
from improved_diffusion.respace import *
from improved_diffusion.unet import *
from improved_diffusion.train_util import *

class Repainting(SpacedDiffusion):
    def q_sample_known(self, x_start, mask, t):
        noise = th.randn_like(x_start)
        return mask * self.q_sample(x_start, t, noise=noise) + (1 - mask) * noise

def make(T):
    betas = np.linspace(1e-4, 0.02, T)
    kinds = dict(model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)
    return Repainting(use_timesteps=space_timesteps(T, [5]), betas=betas, **kinds)

names = th, nn, F, np, math, bf, dist, functools, UNetModel, AttentionBlock
names += TrainLoop, AdamW, DDP, update_ema, zero_grad
"""


def test_star_imports():
    fork = {}
    exec(FORK, fork)
    diffusion = fork["make"](100)
    x_t = diffusion.q_sample_known(torch.ones(1, 3), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4]))
    kept = np.prod(1 - np.linspace(1e-4, 0.02, 100))  # the last of the 5 kept steps is the last of all 100
    torch.manual_seed(0)
    noise = torch.randn(1, 3)
    want = noise.clone()
    want[:, ::2] = kept**0.5 + (1 - kept) ** 0.5 * noise[:, ::2]
    torch.testing.assert_close(x_t, want)
