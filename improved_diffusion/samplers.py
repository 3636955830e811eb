"""
Samplers: functions from noise to data, all of one signature, in one table.

    sampler(diffusion, model, x_T, *, timesteps=None, model_kwargs=None, noise_fn=None,
            clip_denoised=True, denoised_fn=None, callback=None) -> x_0

To add one, write a function and give it a row in SAMPLERS. What a step needs of the model is
diffusion.p_mean_variance(...)["pred_xstart"]: x_0 as implied by x_t, clamped, whatever the model predicts.

    :param diffusion: a GaussianDiffusion.
    :param model: called as model(x_t, t, **model_kwargs), t [N] being trained timesteps.
    :param x_T: standard normal noise, [N, C, ...]. The samples have its shape and device.
    :param timesteps: trained timesteps at which the model is called, strictly decreasing integers;
                      None for all of the diffusion's.
    :param model_kwargs: further keyword arguments of the model.
    :param noise_fn: gives standard normal noise like the tensor it is called with; th.randn_like if None.
    :param clip_denoised: clamp each implied x_0 to [-1, 1].
    :param denoised_fn: applied to each implied x_0, before clamping.
    :param callback: called after each step with a dict of "i" (0, 1, ...), "t" (the trained timestep, an int),
                     "sample" (x after the step) and "pred_xstart" (the x_0 implied before it).
    :return: x_0, without gradients.
"""

from collections.abc import Callable, Sequence

import torch as th

from .gaussian_diffusion import Fn, GaussianDiffusion, Model, if_given
from .respace import visiting

Callback = Callable[[dict], None]


def ancestral(
    diffusion: GaussianDiffusion, model: Model, x_T: th.Tensor, *, timesteps: Sequence[int] | None = None,
    model_kwargs: dict | None = None, noise_fn: Fn | None = None, clip_denoised: bool = True,
    denoised_fn: Fn | None = None, callback: Callback | None = None,
) -> th.Tensor:  # fmt: skip
    """The ancestral chain (Ho et al. 2020, arXiv 2006.11239, algorithm 2): draws x_{t-1} from p(x_{t-1} | x_t)."""
    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
    return _chain("p_sample_loop_progressive", diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs)


def ddim(
    diffusion: GaussianDiffusion, model: Model, x_T: th.Tensor, *, timesteps: Sequence[int] | None = None,
    model_kwargs: dict | None = None, noise_fn: Fn | None = None, clip_denoised: bool = True,
    denoised_fn: Fn | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> th.Tensor:  # fmt: skip
    """
    DDIM (Song et al. 2020, arXiv 2010.02502).

    :param eta: 0 is deterministic, 1 as noisy as the ancestral chain.
    """
    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=clip_denoised, denoised_fn=denoised_fn, eta=eta)
    return _chain("ddim_sample_loop_progressive", diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs)


def _chain(loop, diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs):
    """The last sample of a diffusion's own loop."""
    if timesteps is not None:
        diffusion = visiting(diffusion, timesteps)
    kwargs |= dict(noise=x_T, device=x_T.device, **if_given(noise_fn=noise_fn))
    trained = getattr(diffusion, "timestep_map", range(diffusion.num_timesteps))[::-1]
    steps = getattr(diffusion, loop)(model, tuple(x_T.shape), **kwargs)
    for i, (t, out) in enumerate(zip(trained, steps, strict=True)):
        if callback is not None:
            callback({"i": i, "t": t, "sample": out["sample"], "pred_xstart": out["pred_xstart"]})
    return out["sample"]


SAMPLERS = {"ancestral": ancestral, "ddim": ddim}
