"""
The forward process q: the tables of a noise schedule, and what they say of x_t and x_{t-1} given x_0.

Conventions, here and in gaussian_diffusion.py: data is [N, C, ...] in [-1, 1], with any number of trailing axes.
Timesteps t are integer tensors [N] in 0..T-1, t = 0 the least noisy: x_t of the paper (Nichol & Dhariwal 2021, arXiv
2102.09672) is index t - 1 here, and x_start is its x_0. Tables are float64 numpy arrays [T].
"""

import numpy as np
import torch as th

from .schedules import _extract_into_tensor, read_only

at = _extract_into_tensor  # at(table, t, shape): the table's value at each sample's timestep

TABLES = frozenset(
    """betas alphas_cumprod alphas_cumprod_prev alphas_cumprod_next sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2
    _log_betas _large_variance _large_log_variance""".split()  # noqa: SIM905
)


class ForwardProcess:
    """
    q for one noise schedule.

    The tables (betas, alphas_cumprod, posterior_variance, ...) are read-only. To change one, assign another array,
    `d.betas = d.betas * 0.5`; the other tables keep their values.

    :param betas: [T] in (0, 1], the variance of each step.
    :raises ValueError: if betas is not a one-dimensional array in (0, 1].
    """

    def __init__(self, betas: np.ndarray):
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a one-dimensional array of values in (0, 1], not {betas}")
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # infinite where a last beta of 1 leaves no signal
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), equations 10 to 12
        one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / one_minus_alphas_cumprod
        # the posterior variance at t = 0 is 0, whose logarithm is -inf
        self.posterior_log_variance_clipped = np.log(np.append(self._first_variance(), self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / one_minus_alphas_cumprod
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / one_minus_alphas_cumprod

    def _first_variance(self):
        """The variance that replaces 0 at t = 0: that at t = 1, or beta if there is one step."""
        return self.posterior_variance[1] if len(self.posterior_variance) > 1 else self.betas[0]

    def __setattr__(self, name, value):
        if name in TABLES:
            value = read_only(np.asarray(value))
        super().__setattr__(name, value)
        if name == "betas":
            self._log_betas = np.log(value)
        sources = ("betas", "posterior_variance")
        if name in sources and all(hasattr(self, source) for source in sources):  # FIXED_LARGE
            self._large_variance = np.append(self._first_variance(), self.betas[1:])
            self._large_log_variance = np.log(self._large_variance)

    def __setstate__(self, state):
        # neither pickle nor deepcopy() keeps arrays read-only
        for name, value in state.items():
            setattr(self, name, value)

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (equation 8), each of x_start's shape."""
        mean = at(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = at(1.0 - self.alphas_cumprod, t, x_start.shape)
        log_variance = at(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """
        Draw x_t from q(x_t | x_0) (equation 9).

        :param t: [N], or a shape that broadcasts against the first axes of x_start, such as [N, 1, H, W].
        :param noise: standard normal, x_start's shape; drawn if None.
        :return: x_start's shape.
        :raises ValueError: if the noise has another shape.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        check_shape("noise", noise, x_start.shape)
        mean = at(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return mean + at(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (equations 10 to 12), each of x_t's shape.

        The log-variance is clipped: at t = 0 it is that of t = 1.

        :raises ValueError: if x_start and x_t differ in shape.
        """
        check_shape("x_start", x_start, x_t.shape)
        coef1, coef2 = at(self.posterior_mean_coef1, t, x_t.shape), at(self.posterior_mean_coef2, t, x_t.shape)
        mean = coef1 * x_start + coef2 * x_t
        variance = at(self.posterior_variance, t, x_t.shape)
        log_variance = at(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance


def check_shape(what, tensor, shape):
    if tensor.shape != shape:
        raise ValueError(f"{what} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
