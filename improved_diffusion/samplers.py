"""
Samplers: functions from noise to data, all of one signature, in the table SAMPLERS.

    sampler(diffusion, model, x_T, *, timesteps=None, model_kwargs=None, noise_fn=None,
            clip_denoised=True, denoised_fn=None, callback=None) -> x_0

To add one, write a function and a row in SAMPLERS. diffusion.p_mean_variance(...)["pred_xstart"] is the x_0 predicted
from x_t, whatever the model predicts.

    :param diffusion: a GaussianDiffusion.
    :param model: called as model(x_t, t, **model_kwargs), t [N] the timesteps it is trained on.
    :param x_T: standard normal noise, [N, C, ...].
    :param timesteps: at which to call the model, of those it is trained on, strictly decreasing. None for all; a
                      solver takes steps of them, another keyword (solvers.py).
    :param model_kwargs: keyword arguments for the model.
    :param noise_fn: returns standard normal noise of its argument's shape, dtype and device; th.randn_like if None.
    :param clip_denoised: clamp each predicted x_0 to [-1, 1].
    :param denoised_fn: applied to each predicted x_0 before it is clamped.
    :param callback: called after each step with a dict of "i" (0, 1, ...), "t" (the model's timestep, an int),
                     "sample" (x after the step) and "pred_xstart" (the x_0 predicted in it).
    :return: x_0, of x_T's shape and device, without gradients.
    :raises ValueError: if timesteps do not decrease or are not among the diffusion's.
    :raises TypeError: for timesteps of a plain GaussianDiffusion, which knows no longer process.
"""

import functools
from collections.abc import Callable, Sequence

import torch as th

from .gaussian_diffusion import Fn, GaussianDiffusion, Model, if_given
from .respace import visiting
from .solvers import default_steps, solve

Callback = Callable[[dict], None]


def ancestral(
    diffusion: GaussianDiffusion, model: Model, x_T: th.Tensor, *, timesteps: Sequence[int] | None = None,
    model_kwargs: dict | None = None, noise_fn: Fn | None = None, clip_denoised: bool = True,
    denoised_fn: Fn | None = None, callback: Callback | None = None,
) -> th.Tensor:  # fmt: skip
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2): draw each x_{t-1} from p(x_{t-1} | x_t)."""
    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
    return _run_loop("p_sample_loop_progressive", diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs)


def ddim(
    diffusion: GaussianDiffusion, model: Model, x_T: th.Tensor, *, timesteps: Sequence[int] | None = None,
    model_kwargs: dict | None = None, noise_fn: Fn | None = None, clip_denoised: bool = True,
    denoised_fn: Fn | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> th.Tensor:  # fmt: skip
    """
    DDIM (Song et al. 2020, arXiv 2010.02502, equation 12).

    :param eta: 0 is deterministic, 1 has the noise of the ancestral chain.
    """
    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=clip_denoised, denoised_fn=denoised_fn, eta=eta)
    return _run_loop("ddim_sample_loop_progressive", diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs)


def _run_loop(loop, diffusion, model, x_T, timesteps, noise_fn, callback, **kwargs):
    """Run a loop of the diffusion, so that subclasses may override its steps."""
    if timesteps is not None:
        diffusion = visiting(diffusion, timesteps)
    kwargs |= dict(noise=x_T, device=x_T.device, **if_given(noise_fn=noise_fn))
    model_timesteps = getattr(diffusion, "timestep_map", range(diffusion.num_timesteps))[::-1]
    steps = getattr(diffusion, loop)(model, tuple(x_T.shape), **kwargs)
    for i, (t, out) in enumerate(zip(model_timesteps, steps, strict=True)):
        if callback is not None:
            callback({"i": i, "t": t, "sample": out["sample"], "pred_xstart": out["pred_xstart"]})
    return out["sample"]


dpmpp_2m = functools.partial(solve, order=2)
dpmpp_3m = functools.partial(solve, order=3)
dpmpp_2m_sde = functools.partial(solve, order=2, eta=1.0)
unipc = functools.partial(solve, order=2, corrector=2)

SOLVERS = {"dpm++2m": dpmpp_2m, "dpm++3m": dpmpp_3m, "dpm++2m-sde": dpmpp_2m_sde, "unipc": unipc}
SAMPLERS: dict[str, Callable[..., th.Tensor]] = {"ancestral": ancestral, "ddim": ddim, **SOLVERS}


def evaluations(sampler: str, diffusion: GaussianDiffusion, steps: int | None = None) -> int:
    """How often a sampler, a key of SAMPLERS, calls the model."""
    return (steps or default_steps(diffusion)) if sampler in SOLVERS else diffusion.num_timesteps
