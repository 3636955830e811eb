"""
Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): samples that fit their class better and vary less.

The network is trained with labels that are dropped with some probability, and so predicts with a class and without. Its
output is extrapolated from the second to the first, with S the guidance scale:

    eps = eps_null + S (eps_cond - eps_null)

and the same for a predicted x_0. A learned variance is the conditional one's. Guidance in an interval of noise levels
keeps more variety, and its other steps cost half (Kynkäänniemi et al. 2024, arXiv 2404.07724).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th

from .utils.errors import InputError


def guided(model: Any, diffusion: Any, scale: float, interval: str = "0,inf") -> Callable:
    """
    Wrap a class-conditional network, for any sampler. Each call is one of twice the batch.

    :param model: with null_label, the label for no class; called as model(x_t, t, y=[N], **tensors [N, ...]).
    :param diffusion: of the timesteps that the sampler visits, or more.
    :param scale: S. At 1 the model is returned as it is.
    :param interval: "LOW,HIGH", noise levels sigma = sqrt((1 - abar) / abar); outside the model is called as it is.
    :raises InputError: if the network has no null label, or no timestep is in the interval.
    """
    if scale == 1:
        return model
    null_label = getattr(model, "null_label", None)
    if null_label is None:
        raise InputError(f"guidance_scale {scale:g}: the model was not trained with class_dropout")
    low, high = interval_of(interval)
    sigmas = np.asarray(diffusion.sqrt_recipm1_alphas_cumprod)
    (inside,) = np.nonzero((low <= sigmas) & (sigmas <= high))
    if not len(inside):
        known = f"from {sigmas[0]:.3g} to {sigmas[-1]:.3g}"
        raise InputError(f"guidance_interval {interval}: no timestep lies in it; sigma goes {known}")
    if len(inside) == len(sigmas):
        return _Guided(model, null_label, scale)
    # as the model sees them; half a step of margin, as they are rounded
    timesteps = getattr(diffusion, "timestep_map", range(len(sigmas)))
    length = getattr(diffusion, "original_num_steps", len(sigmas))
    unit = 1000 / length if diffusion.rescale_timesteps else 1
    first, last = timesteps[inside[0]] - 0.5, timesteps[inside[-1]] + 0.5
    return _Guided(model, null_label, scale, first * unit, last * unit)


def interval_of(text: str) -> tuple[float, float]:
    """:raises InputError: if text is not LOW,HIGH with LOW below HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low < high:
        raise InputError(f"guidance_interval {text}: give two noise levels LOW,HIGH, such as 0.3,5")
    return low, high


class _Guided:
    def __init__(self, model, null_label, scale, first=-math.inf, last=math.inf):
        self.model, self.null_label, self.scale = model, null_label, scale
        self.first, self.last = first, last  # timesteps

    def __call__(self, x, t, *, y, **kwargs):
        inside = (self.first < t) & (t < self.last)  # (N,)
        if math.isfinite(self.last) and not inside.any():  # waits for the device, only with an interval
            return self.model(x, t, y=y, **kwargs)
        twice = {name: th.cat([v, v]) for name, v in kwargs.items()}
        labels = th.cat([y, th.full_like(y, self.null_label)])
        cond, null = self.model(th.cat([x, x]), th.cat([t, t]), y=labels, **twice).chunk(2)  # [N, C or 2C, ...] each
        scale = th.where(inside, self.scale, 1.0).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        cond, variance = cond.split([x.shape[1], cond.shape[1] - x.shape[1]], dim=1)  # no channels if it is fixed
        null = null[:, : x.shape[1]]
        return th.cat([null + scale * (cond - null), variance], dim=1)
