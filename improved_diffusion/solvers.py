"""
Exponential multistep integrators: good samples in 10 to 20 evaluations of the network.

With a = sqrt(abar), s = sqrt(1 - abar) and lam = log(a / s), half the log-SNR, a step from t_i to t_n with h = lam_n -
lam_i, H = (1 + eta) h and E = 1 - exp(-H) is

    x_n = (s_n / s_i) exp(-eta h) x_i + a_n (E m0 + C) + s_n sqrt(1 - exp(-2 eta h)) z

m0, m1, m2 are the newest predictions of x_0, z is noise, and C extrapolates m over the step: DPM-Solver++ (Lu et al.
2022, arXiv 2211.01095). eta is 0 for the ODE, 1 for the SDE of ancestral sampling. The corrector UniC (Zhao et al.
2023, arXiv 2302.04867) improves x_n by the prediction at x_n, which the next step needs anyway.

All t_i are integers that the network is trained on. Samples of a batch share them, so coefficients are Python floats.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch as th

from .gaussian_diffusion import Fn, GaussianDiffusion, Model
from .respace import indices_of
from .utils.errors import InputError

SPACINGS = ("lam", "karras", "time")
LAM_MIN = -5.1  # signal below: a cosine schedule's last timesteps, where predictions of x_0 are noise
STEPS = 20
RHO = 7  # of Karras et al. 2022, arXiv 2206.00364, equation 5


def half_log_snr(diffusion: GaussianDiffusion) -> np.ndarray:
    """lam of each timestep, float64 [T], decreasing."""
    abar = np.asarray(diffusion.alphas_cumprod, dtype=np.float64)
    with np.errstate(divide="ignore"):  # -inf where a schedule ends in pure noise
        return 0.5 * (np.log(abar) - np.log1p(-abar))


def time_grid(lam: np.ndarray, steps: int, spacing: str = "lam") -> list[int]:
    """
    Timesteps for a number of evaluations.

    :param lam: half_log_snr().
    :param steps: evaluations, K.
    :param spacing: uniform in "lam", as Karras et al. in sigma ("karras"), or uniform in "time".
    :return: K + 1 strictly decreasing timesteps, the last one 0; the network is evaluated at all but that.
    :raises InputError: (a ValueError) if there are not as many timesteps, or there is no such spacing.
    """
    first = _first(lam)
    if first < 1:
        problem = f"a solver needs 2 timesteps of half log-SNR {LAM_MIN} or more"
        raise InputError(f"diffusion_steps {len(lam)}: {problem}; give sampler ancestral or ddim")
    if not 1 <= steps <= first:
        raise InputError(f"sampling_steps {steps}: give 1 to {first}, the timesteps between noise and data")
    if spacing not in SPACINGS:
        raise InputError(f"spacing {spacing}: give {' or '.join(SPACINGS)}")
    part = np.linspace(0, 1, steps + 1)
    if spacing == "time":
        times = [round(first * (1 - p)) for p in part]
    else:
        if spacing == "lam":
            wanted = lam[first] + part * (lam[0] - lam[first])
        else:
            high, low = (math.exp(-lam[t] / RHO) for t in (first, 0))
            wanted = -RHO * np.log(high + part * (low - high))
        times = [int(np.abs(lam - value).argmin()) for value in wanted]
    times[0], times[-1] = first, 0
    for i in reversed(range(steps)):  # distinct timesteps, first from the clean end
        times[i] = max(times[i], times[i + 1] + 1)
    return [min(t, first - i) for i, t in enumerate(times)]  # and from the noisy end


def default_steps(diffusion: GaussianDiffusion) -> int:
    """20 evaluations, or as many as there are timesteps for."""
    return min(STEPS, _first(half_log_snr(diffusion)))


def _first(lam):
    """The noisiest timestep with signal; 0 if there is none."""
    return int(np.flatnonzero(lam >= LAM_MIN).max(initial=0))


def solve(
    diffusion: GaussianDiffusion, model: Model, x_T: th.Tensor, *, timesteps: Sequence[int] | None = None,
    model_kwargs: dict | None = None, noise_fn: Fn | None = None, clip_denoised: bool = True,
    denoised_fn: Fn | None = None, callback: Callable[[dict], None] | None = None,
    steps: int | None = None, spacing: str = "lam", order: int = 2, eta: float = 0.0, corrector: int = 0,
    exact: bool = False,
) -> th.Tensor:  # fmt: skip
    """
    Integrate from noise to data. Parameters that are not here are those of samplers.py.

    :param timesteps: at which to evaluate the network; the last step ends without noise. Default: of steps and spacing.
    :param steps: evaluations of the network; default: 20, or as many as there are timesteps for.
    :param spacing: see time_grid(). The last step ends at the noise of t = 0, sqrt(1 - abar_0), and leaves it.
    :param order: 1 to 3, of the predictor. The first and the last steps have less.
    :param eta: noise, 0 to 1.
    :param corrector: the order of UniC, for eta = 0; 0 = none.
    :param exact: coefficients that integrate a polynomial in lam exactly. The usual ones are better at few steps.
    :raises ValueError: for a corrector with noise, an order or eta out of range, and as time_grid().
    """
    if not (1 <= order <= 3 and 0 <= corrector <= 3 and 0 <= eta <= 1):
        valid = "give order 1 to 3, corrector 0 to 3 and eta 0 to 1"
        raise ValueError(f"order={order}, corrector={corrector}, eta={eta}: {valid}")
    if corrector and eta:
        raise ValueError(f"eta={eta}: a corrector integrates the ODE, eta=0")
    lam = half_log_snr(diffusion)
    timestep_map = list(getattr(diffusion, "timestep_map", range(len(lam))))  # the model's timesteps
    if timesteps is None:
        times = time_grid(lam, default_steps(diffusion) if steps is None else steps, spacing)
        lams = [float(lam[t]) for t in times]
    else:
        times = indices_of(timesteps, timestep_map)
        lams = [*(float(lam[t]) for t in times), math.inf]
    kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)

    def predict(x, t):
        ts = th.full((len(x),), t, dtype=th.long, device=x.device)
        # a network in float16 may answer in it: the history and its differences are of x's dtype
        return diffusion.p_mean_variance(model, x, ts, **kwargs)["pred_xstart"].to(x.dtype)

    x, steps = x_T, len(lams) - 1
    with th.no_grad():
        history = [predict(x, times[0])]  # the newest first
        for i in range(steps):
            history_lams = lams[i::-1]
            x_n = _step(x, history[: min(order, steps - i)], history_lams, lams[i + 1], eta, exact)
            if eta and lams[i + 1] < math.inf:
                z = (noise_fn or th.randn_like)(x)
                x_n = x_n + _sigma(lams[i + 1]) * math.sqrt(-math.expm1(-2 * eta * (lams[i + 1] - lams[i]))) * z
            if callback is not None:
                callback({"i": i, "t": timestep_map[times[i]], "sample": x_n, "pred_xstart": history[0]})
            if i + 1 < steps:
                new = predict(x_n, times[i + 1])
                if corrector:
                    x_n = _correct(x, new, history[:corrector], history_lams, lams[i + 1])
                history = [new, *history[:2]]
            x = x_n
    return x


def _alpha(lam):
    return 1 / math.sqrt(1 + math.exp(-2 * lam))


def _sigma(lam):
    return 1 / math.sqrt(1 + math.exp(2 * lam)) if lam < math.inf else 0.0


def _step(x, history, lams, lam_n, eta, exact):
    """
    The mean of a step.

    :param history: predictions of x_0, the newest first; as many as the order.
    :param lams: of the history.
    :param lam_n: the destination's.
    """
    m0 = history[0]
    if lam_n == math.inf:
        return m0
    h = lam_n - lams[0]
    H = (1 + eta) * h
    E = -math.expm1(-H)
    mean = E * m0
    p2 = 1 - E / H
    if len(history) == 2:
        D = (m0 - history[1]) * (h / (lams[0] - lams[1]))
        mean = mean + (p2 if exact else E / 2) * D
    elif len(history) == 3:
        m1, m2 = history[1:]
        r0, r1 = (lams[0] - lams[1]) / h, (lams[1] - lams[2]) / h
        d0, d1 = (m0 - m1) / r0, (m1 - m2) / r1
        D1, D2 = d0 + (d0 - d1) * (r0 / (r0 + r1)), (d0 - d1) / (r0 + r1)
        p3 = p2 / H - 0.5
        mean = mean + p2 * D1 - (2 if exact else 1) * p3 * D2
    return _sigma(lam_n) / _sigma(lams[0]) * math.exp(-eta * h) * x + _alpha(lam_n) * mean


def _correct(x, new, history, lams, lam_n):
    """
    UniC: the step to lam_n again, now that its prediction is known.

    :param new: the prediction at the destination.
    :param history: predictions before, the newest first; with `new` as many as the order + 1.
    """
    h, m0, p = lam_n - lams[0], history[0], len(history)
    B = math.expm1(-h)
    r = [*((lams[k] - lams[0]) / h for k in range(1, p)), 1.0]
    phi, rows = -B / h - 1, []  # phi_1
    for q in range(1, p + 1):
        rows.append(math.factorial(q) * phi / B)
        phi = -phi / h - 1 / math.factorial(q + 1)
    c = [0.5] if p == 1 else np.linalg.solve([[r_k ** (q - 1) for r_k in r] for q in range(1, p + 1)], rows).tolist()
    mean = B * (c[-1] * (new - m0))
    for k in range(1, p):
        mean = mean + B * c[k - 1] / r[k - 1] * (history[k] - m0)
    return _sigma(lam_n) / _sigma(lams[0]) * x - _alpha(lam_n) * (B * m0 + mean)
