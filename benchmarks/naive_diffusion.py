"""
The textbook form of each step, for comparison: what the arithmetic of one costs where nothing was done about it.

Every look-up copies a float64 numpy table to the device, indexes it, converts what it found and repeats it to
the shape of the images; every quantity of a step is computed in full, wanted or not; a loop makes its timesteps,
and those that the model knows them by, from Python lists. The numbers are those of improved_diffusion, for a model
that predicts the noise and, in the losses, a variance in the learned range. x is [N, C, ...], t is [N]; equations
are of arXiv 2102.09672.
"""

import math

import numpy as np
import torch as th


class NaiveDiffusion:
    """:param betas: float64 array [T]; learn_sigma: the model's output is [N, 2C, ...]."""

    def __init__(self, betas, learn_sigma=False):
        self.learn_sigma, self.num_timesteps = learn_sigma, len(betas)
        self.timestep_map = list(range(len(betas)))  # of a respaced process: the places of its steps in the longer one
        alpha_bar = np.cumprod(1 - betas)
        before = np.append(1.0, alpha_bar[:-1])
        variance = betas * (1 - before) / (1 - alpha_bar)  # equation 10
        self.alpha_bar, self.alpha_bar_before = alpha_bar, before
        self.signal, self.noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        self.recip, self.recipm1 = np.sqrt(1 / alpha_bar), np.sqrt(1 / alpha_bar - 1)
        self.posterior = variance, np.log(np.append(variance[1], variance[1:]))
        self.large = np.append(variance[1], betas[1:]), np.log(np.append(variance[1], betas[1:]))
        self.of_x_start = betas * np.sqrt(before) / (1 - alpha_bar)  # equation 11
        self.of_x_t = (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bar)
        self.log_betas = np.log(betas)

    def q_posterior(self, x_start, x_t, t):
        mean = look_up(self.of_x_start, t, x_t) * x_start + look_up(self.of_x_t, t, x_t) * x_t
        return mean, *(look_up(table, t, x_t) for table in self.posterior)

    def p_mean_variance(self, model, x, t, clip=True):
        output = model(x, th.tensor(self.timestep_map, device=t.device)[t])
        if self.learn_sigma:
            output, v = th.split(output, x.shape[1], dim=1)
            fraction = (v + 1) / 2
            low, high = look_up(self.posterior[1], t, x), look_up(self.log_betas, t, x)
            log_variance = fraction * high + (1 - fraction) * low  # equation 15
            variance = th.exp(log_variance)
        else:
            variance, log_variance = (look_up(table, t, x) for table in self.large)
        x_start = look_up(self.recip, t, x) * x - look_up(self.recipm1, t, x) * output
        if clip:
            x_start = x_start.clamp(-1, 1)
        mean, _, _ = self.q_posterior(x_start, x, t)
        return mean, variance, log_variance, x_start

    def p_sample(self, model, x, t):
        mean, _, log_variance, _ = self.p_mean_variance(model, x, t)
        noise = th.randn_like(x)
        return mean + not_first(t, x) * th.exp(0.5 * log_variance) * noise

    def ddim_sample(self, model, x, t, eta=0.0):
        *_, x_start = self.p_mean_variance(model, x, t)
        eps = (look_up(self.recip, t, x) * x - x_start) / look_up(self.recipm1, t, x)
        now, before = look_up(self.alpha_bar, t, x), look_up(self.alpha_bar_before, t, x)
        sigma = eta * th.sqrt((1 - before) / (1 - now)) * th.sqrt(1 - now / before)
        noise = th.randn_like(x)
        mean = x_start * th.sqrt(before) + th.sqrt(1 - before - sigma**2) * eps
        return mean + not_first(t, x) * sigma * noise

    def sample_loop(self, step, model, shape, device):
        """:param step: self.p_sample or self.ddim_sample."""
        x = th.randn(*shape, device=device)
        for i in reversed(range(self.num_timesteps)):
            t = th.tensor([i] * shape[0], device=device)
            with th.no_grad():
                x = step(model, x, t)
        return x

    def training_losses(self, model, x_start, t):
        """The hybrid loss (equation 16, the bound not scaled), [N]."""
        noise = th.randn_like(x_start)
        x_t = look_up(self.signal, t, x_start) * x_start + look_up(self.noise, t, x_start) * noise
        output = model(x_t, th.tensor(self.timestep_map, device=t.device)[t])
        eps, v = th.split(output, x_start.shape[1], dim=1)
        frozen = th.cat([eps.detach(), v], dim=1)
        return mean((noise - eps) ** 2) + self.bound(lambda x, t: frozen, x_start, x_t, t)

    def bound(self, model, x_start, x_t, t):
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        means, _, log_variance, _ = self.p_mean_variance(model, x_t, t, clip=False)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + th.exp(true_log_variance - log_variance)
            + (true_mean - means) ** 2 * th.exp(-log_variance)
        )
        nll = -log_likelihood(x_start, means, 0.5 * log_variance)
        return th.where(t == 0, mean(nll) / math.log(2.0), mean(kl) / math.log(2.0))


def log_likelihood(x, means, log_scales):
    """Of 8-bit values under a Gaussian cut into bins (Ho et al. 2020, equation 13)."""
    centered, inv_stdv = x - means, th.exp(-log_scales)
    above, below = cdf(inv_stdv * (centered + 1 / 255)), cdf(inv_stdv * (centered - 1 / 255))
    first, last = th.log(above.clamp(min=1e-12)), th.log((1 - below).clamp(min=1e-12))
    inner = th.log((above - below).clamp(min=1e-12))
    return th.where(x < -0.999, first, th.where(x > 0.999, last, inner))


def cdf(x):
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * th.pow(x, 3))))


def look_up(table, t, x):
    values = th.from_numpy(table).to(device=t.device)[t].float()
    while values.dim() < x.dim():
        values = values[..., None]
    return values.expand(x.shape)


def not_first(t, x):
    return (t != 0).float().view(-1, *[1] * (x.dim() - 1))


def mean(x):
    return x.mean(dim=list(range(1, x.dim())))
