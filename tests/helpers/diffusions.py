"""What the tests of the diffusion share: its kinds, one of any betas, and models whose answers are known."""

import numpy as np
import torch as th
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from improved_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType

MEANS = [m.name for m in ModelMeanType]
VARS = [v.name for v in ModelVarType]
LOSS_TYPES = [v.name for v in LossType]

beta_arrays = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-5, 0.9))


def diffusion_of(betas, mean="EPSILON", var="FIXED_SMALL", loss="MSE", **kwargs):
    return GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
        **kwargs,
    )


def always(output):
    """A model that answers every question with the same tensor."""
    return lambda x, t: output


def point_model(diffusion, x_start):
    """The perfect model of data that is always x_start, whatever the diffusion wants predicted."""

    def model(x, t):
        if diffusion.model_mean_type == ModelMeanType.START_X:
            out = x_start
        elif diffusion.model_mean_type in (ModelMeanType.EPSILON, ModelMeanType.VELOCITY):
            alpha_bar = th.tensor(diffusion.alphas_cumprod)[t].view(-1, *[1] * (x.dim() - 1))
            eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
            velocity = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start
            out = (eps if diffusion.model_mean_type == ModelMeanType.EPSILON else velocity).float()
        else:
            out = diffusion.q_posterior_mean_variance(x_start, x, t)[0]
        learned = diffusion.model_var_type.name.startswith("LEARNED")
        return th.cat([out, -th.ones_like(out)], dim=1) if learned else out

    return model
