"""
The K timesteps with the best bound, by dynamic programming (Watson et al. 2021, arXiv 2106.03802).

The bound of a chain over t_1 < ... < t_K is a sum: the decoder's term at t_1, a KL for each jump t_k -> t_{k-1}, the
prior's term at t_K. One evaluation of the network at each t gives x_0's prediction and v (equation 15 of arXiv
2102.09672), and with them the KL of every jump t -> s:

    KL = 1/2 E[v r - 1 + exp(-v r) + (SNR_s - SNR_t) (x_0 - prediction)^2 exp(-v r)]
    r = log((1 - alpha_bar_t) / (1 - alpha_bar_s)), the log-ratio of the jump's beta and posterior variance
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from .. import dist_util, logger
from ..gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from ..inference.generate import noise_of, not_finite
from ..losses import discretized_gaussian_log_likelihood
from ..nn import mean_flat
from ..utils.progress import Progress, count_calls

RATIOS = 96  # values of r at which each t's expectations are tabulated
VARIANCES = 24  # values of the decoder's variance likewise


@dataclass(frozen=True)
class Costs:
    """
    The terms of the bounds of all chains over some of T timesteps, in bits per dimension.

    :param jump: [T, T], of the jump t -> s; infinite unless s < t.
    :param decoder: [S, T], of t_1 = s when t_2 = t, for the S smallest timesteps.
    :param alone: [S], of t_1 = s in a chain of one timestep.
    :param prior: [T], of t_K = t.
    """

    jump: np.ndarray
    decoder: np.ndarray
    alone: np.ndarray
    prior: np.ndarray

    def bound(self, timesteps: Sequence[int]) -> float:
        """The bound of a chain of increasing timesteps, the first below S."""
        first, *rest = timesteps = list(timesteps)
        start = self.decoder[first, rest[0]] if rest else self.alone[first]
        return float(start + self.jump[rest, timesteps[:-1]].sum() + self.prior[timesteps[-1]])


def plan(costs: Costs, counts: Sequence[int]) -> dict[int, list[int]]:
    """The best chain of each number of timesteps: {count: increasing timesteps}."""
    candidates = np.arange(len(costs.alone))
    best = np.full(len(costs.prior), np.inf)
    best[candidates] = costs.alone
    chains = {1: [int(np.argmin(best + costs.prior))]}
    came_from: list[np.ndarray] = []  # for chains of 2, 3, ... timesteps: [T], the last but one
    for count in range(2, max(counts) + 1):
        options = costs.jump[:, candidates] + costs.decoder.T if count == 2 else costs.jump + best
        came_from.append(options.argmin(axis=1))
        best = options.min(axis=1)
        if count in counts:
            chain = [int(np.argmin(best + costs.prior))]
            for before in reversed(came_from):
                chain.append(int(before[chain[-1]]))
            chains[count] = chain[::-1]
    return {count: chains[count] for count in counts}


class Jumps:
    """
    The schedule of all jumps of a diffusion, and where the expectations of each timestep are tabulated.

    log_ratio[t, s] is r above; first_log_variance[t, s] the log of the posterior variance of t -> s, which is the
    variance of t_1 = s if t_2 = t: at one end of the model's range, or fixed.
    """

    def __init__(self, diffusion: GaussianDiffusion):
        alpha_bar, self.num_timesteps = diffusion.alphas_cumprod, diffusion.num_timesteps
        self.log_noise = np.log1p(-alpha_bar)
        self.log_ratio = self.log_noise[:, None] - self.log_noise
        self.snr = alpha_bar / (1 - alpha_bar)
        with np.errstate(divide="ignore", invalid="ignore"):  # where s >= t
            self.first_log_variance = np.log(1 - alpha_bar[:, None] / alpha_bar) - self.log_ratio
        self.num_first = min(self.num_timesteps, max(32, self.num_timesteps // 50))  # an S for Costs

    def ratios(self, t: int) -> np.ndarray:
        """Values of r between those of t -> t - 1 and t -> 0, t > 0."""
        return np.geomspace(self.log_ratio[t, t - 1], self.log_ratio[t, 0], RATIOS)

    def log_variances(self, s: int) -> np.ndarray:
        """Values of first_log_variance between those of s + 1 -> s and of a chain of one timestep."""
        highest = self.log_noise[s]
        return np.linspace(self.first_log_variance[s + 1 : s + 2, s].min(initial=highest), highest, VARIANCES)


@th.inference_mode()
def measure_costs(
    model, diffusion: GaussianDiffusion, data, clip_denoised: bool = True, seed: int | None = None,
    model_path: str = "the model", use_fp16: bool = False,
) -> Costs:  # fmt: skip
    """
    Evaluate a network at each timestep of each image, once. A collective: each rank has every world_size()-th image.

    :param data: an iterator from load_data_once(); the costs are means over its images.
    :param seed: makes each image's noise depend on its index alone.
    :param model_path, use_fp16: of the network, for messages.
    :raises ValueError: if the model predicts the mean of x_{t-1}, or the variances of its steps alone.
    :raises InputError: if the network's output is not finite.
    """
    if diffusion.model_mean_type == ModelMeanType.PREVIOUS_X or diffusion.model_var_type == ModelVarType.LEARNED:
        needed = "a model of x_0, the noise or the velocity, with fixed or interpolated variances"
        raise ValueError(f"other jumps need {needed}")
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    jumps, steps = Jumps(diffusion), diffusion.num_timesteps
    shapes = (steps, RATIOS), (steps, RATIOS), (jumps.num_first, VARIANCES), (1,), (1,)
    local = [th.zeros(shape, dtype=th.float64, device=device) for shape in shapes]
    excess, error, decoder, energy, count = local
    number = rank  # of the batch's first image
    with Progress("measuring", len(data) * steps, "steps", logger.log, show=rank == 0) as progress:
        model = count_calls(model, progress)
        for x_start, cond in data:
            x_start, cond = x_start.to(device), {k: v.to(device) for k, v in cond.items()}
            numbers = range(number, number + world * len(x_start), world)
            noise_fn = noise_of(seed, numbers)
            number = numbers.stop
            count += len(x_start)
            energy += mean_flat(x_start.double() ** 2).sum()
            for t in reversed(range(steps)):
                pred, v = _predict(diffusion, model, x_start, t, noise_fn(x_start), clip_denoised, cond)
                if t > 0:
                    added = _jump_moments(x_start, pred, v, jumps.ratios(t))
                    excess[t] += added[0]
                    error[t] += added[1]
                if t < jumps.num_first:
                    learned = diffusion.model_var_type == ModelVarType.LEARNED_RANGE
                    share = v if learned else th.zeros_like(v)
                    decoder[t] += _decoder_nats(x_start, pred, share, jumps.log_variances(t), jumps.log_noise[t])
    dist_util.barrier()  # on the CPU, where missing ranks are named
    sums = [dist_util.all_reduce_sum(a).cpu().numpy() for a in local]
    if not all(np.isfinite(a).all() for a in sums):
        raise not_finite(model_path, use_fp16)
    excess, error, decoder, energy = (a / sums[-1] for a in sums[:-1])
    return _costs(jumps, diffusion.alphas_cumprod, excess, error, decoder, energy)


def _predict(diffusion, model, x_start, t, noise, clip_denoised, cond):
    """The predicted x_0 and v, each of x_start's shape."""
    outputs = []

    def spy(*args, **kwargs):
        outputs.append(model(*args, **kwargs))
        return outputs[-1]

    t = th.full((len(x_start),), t, device=x_start.device)
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    pred = diffusion.p_mean_variance(spy, x_t, t, clip_denoised=clip_denoised, model_kwargs=cond)["pred_xstart"]
    if diffusion.model_var_type == ModelVarType.LEARNED_RANGE:
        return pred, (outputs[0].chunk(2, dim=1)[1] + 1) / 2
    return pred, th.full_like(pred, float(diffusion.model_var_type == ModelVarType.FIXED_LARGE))


def _jump_moments(x_start, pred, v, ratios):
    """For each r: E[exp(-v r) - 1 + v r] / r^2, and E[(x_0 - pred)^2 exp(-v r)], summed over images."""
    v, squares = v.double(), (x_start - pred).double() ** 2
    excess, error = [], []
    for r in ratios.tolist():
        decay = th.expm1(-v * r)
        excess.append((decay + v * r).mean() / r**2)
        error.append(((decay + 1) * squares).mean())
    return len(x_start) * th.stack([th.stack(excess), th.stack(error)])


def _decoder_nats(x_start, pred, v, log_variances, upper):
    """For each log-variance at the lower end of v: -log p(x_0 | x_1) per dimension, summed over images."""
    nats = []
    for lower in log_variances.tolist():
        log_scales = 0.5 * (v * upper + (1 - v) * lower)  # equation 15
        nats.append(-discretized_gaussian_log_likelihood(x_start, means=pred, log_scales=log_scales).double().mean())
    return len(x_start) * th.stack(nats)


def _costs(jumps, alpha_bar, excess, error, decoder, energy):
    steps, first = jumps.num_timesteps, jumps.num_first
    jump, start = np.full((steps, steps), np.inf), np.full((first, steps), np.inf)
    for t in range(1, steps):
        r, grid = jumps.log_ratio[t, :t], jumps.ratios(t)
        of_variance = r**2 * np.interp(r, grid, excess[t])
        of_mean = np.exp(np.interp(r, grid, np.log(np.maximum(error[t], 1e-300))))
        jump[t, :t] = of_variance / 2 + (jumps.snr[:t] - jumps.snr[t]) * of_mean / 2
    for s in range(first):
        start[s, s + 1 :] = np.interp(jumps.first_log_variance[s + 1 :, s], jumps.log_variances(s), decoder[s])
    prior = (alpha_bar * (energy - 1) - jumps.log_noise) / 2
    return Costs(*(nats / math.log(2) for nats in (jump, start, decoder[:, -1], prior)))
