"""
An unbiased estimate of the variational bound from few evaluations of the network an image.

The bound is a sum of L_t over T timesteps. Importance sampling, as in training (arXiv 2102.09672, equation 18):

    L = prior + (1/M) sum_j L_{t_j} / p_{t_j},    p_t proportional to sqrt(E[L_t^2])

with t_j = F^-1((u + j) / M), systematic samples of p: they cover all of p, so that little of the variance of
independent samples is left. L_0, about half of the bound, gets a fixed number of evaluations instead of a random one.
"""

import functools
import itertools

import numpy as np
import torch as th

from ..gaussian_diffusion import Fn, GaussianDiffusion, Model

PILOT_IMAGES = 16
BINS = 32  # of log t, at most
UNIFORM = 1e-3  # share of p: terms that the pilot misses have bounded weights


def log_bins(num_timesteps: int) -> np.ndarray:
    """Edges of bins of log t: bin b has the timesteps edges[b] to edges[b + 1] - 1, the first t = 0 alone."""
    return np.unique(np.round(np.geomspace(1, num_timesteps + 1, BINS + 1)).astype(int)) - 1


def draw_timesteps(p: np.ndarray, count: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Draw timesteps for N images by systematic sampling: an estimate of sum_t L_t is sum_j weight_j L_{t_j}.

    :param p: [T], sums to 1. t = 0 gets about p[0] of the samples, at least one unless there is but one.
    :param count: number of samples an image.
    :param u: [N], uniform in (0, 1).
    :return: (timesteps, int64 [N, count], noisiest first; weights, float64 [N, count]).
    """
    first = count if len(p) == 1 else min(max(1, round(count * p[0])), count - 1)
    rest = count - first
    t, weights = np.zeros((len(u), count), dtype=np.int64), np.full((len(u), count), 1 / max(first, 1))
    if rest:
        if first:
            p = np.append(0.0, p[1:])
        p = p / p.sum()
        positions = (u[:, None] + np.arange(rest)[::-1]) / rest
        t[:, :rest] = np.searchsorted(np.cumsum(p), positions, side="right").clip(max=len(p) - 1)
        weights[:, :rest] = 1 / (rest * p[t[:, :rest]])
    return t, weights


def estimate_bpd(
    diffusion: GaussianDiffusion, model: Model, x_start: th.Tensor, *, p: np.ndarray, evaluations: int,
    clip_denoised: bool = True, model_kwargs: dict | None = None, noise_fn: Fn = th.randn_like, repetitions: int = 2,
) -> dict[str, th.Tensor]:  # fmt: skip
    """
    Estimate what calc_bpd_loop() computes. Unbiased for any positive p.

    :param p: [T], probabilities of the timesteps.
    :param evaluations: of the model an image, shared by the repetitions.
    :param noise_fn: as in p_sample(); draws each image's u too.
    :param repetitions: independent estimates, which are averaged.
    :return: "total_bpd" and "prior_bpd" [N]; "vb" [N, T], whose expectations are the terms, t = T - 1 first; with
             several repetitions "variance" [N], an unbiased estimate of that of total_bpd by timesteps and noise.
    """
    n, term = len(x_start), functools.partial(_term, diffusion, model, x_start, noise_fn, clip_denoised, model_kwargs)
    vb = th.zeros(repetitions, n, diffusion.num_timesteps, dtype=th.float64, device=x_start.device)
    for i in range(repetitions):
        u = th.special.ndtr(noise_fn(x_start.new_empty(n, 1)).double())[:, 0].cpu().numpy()
        count = (evaluations + i) // repetitions
        drawn = (th.from_numpy(v).to(x_start.device).T for v in draw_timesteps(p, count, u))
        for t, weights in zip(*drawn, strict=True):
            vb[i].scatter_add_(1, t[:, None], (weights * term(t))[:, None])
    totals, prior = vb.sum(dim=2), diffusion._prior_bpd(x_start)
    metrics = {"total_bpd": totals.mean(dim=0) + prior, "prior_bpd": prior, "vb": vb.mean(dim=0).flip(1)}
    return metrics | ({"variance": totals.var(dim=0) / repetitions} if repetitions > 1 else {})


def pilot_evaluations(num_timesteps: int, images: int) -> int:
    """Of the model by pilot_sums() of the first PILOT_IMAGES of some images."""
    return 2 * (len(log_bins(num_timesteps)) - 1) * min(PILOT_IMAGES, images)


def pilot_sums(
    diffusion: GaussianDiffusion, model: Model, x_start: th.Tensor, numbers: np.ndarray, *, clip_denoised: bool = True,
    model_kwargs: dict | None = None, noise_fn: Fn = th.randn_like,
) -> np.ndarray:  # fmt: skip
    """
    Evaluate some images at one timestep of each bin, with two noises, for importance_weights().

    :param numbers: the indices of the images, which choose the timesteps within the bins.
    :return: float64 [2, bins], sums over the images of L_t^2, and of L_t's variance by noise.
    """
    term = functools.partial(_term, diffusion, model, x_start, noise_fn, clip_denoised, model_kwargs)
    squares, variances = [], []
    for b, (low, high) in enumerate(itertools.pairwise(log_bins(diffusion.num_timesteps))):
        within = (numbers * 0.618 + b * 0.382) % 1  # spread evenly over the bin
        t = th.from_numpy(low + (within * (high - low)).astype(np.int64)).to(x_start.device)
        one, other = (term(t).double() for _ in range(2))
        squares.append((one**2 + other**2).sum() / 2)
        variances.append((one - other).square().sum() / 2)
    return th.stack([th.stack(squares), th.stack(variances)]).cpu().numpy()


@th.no_grad()
def _term(diffusion, model, x_start, noise_fn, clip_denoised, model_kwargs, t):
    """A draw of the term of the bound at t [N], in bits per dimension, [N]."""
    x_t = diffusion.q_sample(x_start, t, noise=noise_fn(x_start))
    kwargs = dict(clip_denoised=clip_denoised, model_kwargs=model_kwargs)
    return diffusion._vb_terms_bpd(model, x_start=x_start, x_t=x_t, t=t, **kwargs)["output"]


def importance_weights(sums: np.ndarray, num_timesteps: int) -> np.ndarray:
    """
    p [T] from the sums of a pilot [2, bins].

    p_t is proportional to sqrt(E[L_t^2]) for t > 0. Systematic samples leave little more than the noise of each term,
    so that p_0 is the share of t = 0 in the sum of the noises' standard deviations.
    """
    sizes, spreads = (_by_timestep(np.sqrt(row), num_timesteps) for row in sums)
    share = spreads[0] / spreads.sum()
    p = np.append(share, (1 - share) * sizes[1:] / sizes[1:].sum())
    return (1 - UNIFORM) * p + UNIFORM / num_timesteps


def _by_timestep(roots, num_timesteps):
    """
    Interpolate values of bins [bins] in log t: [T].

    Logarithms are rounded to 0.01: else rounding in the network, which depends on batch sizes, could move a timestep.
    """
    if not roots.any():
        return np.ones(num_timesteps)
    log_t = np.log(np.arange(1, num_timesteps + 1))
    centres = [log_t[low:high].mean() for low, high in itertools.pairwise(log_bins(num_timesteps))]
    logs = np.log(np.maximum(roots, 1e-6 * roots.max()))
    return np.exp(np.interp(log_t, centres, np.round(logs - logs.max(), 2)))
