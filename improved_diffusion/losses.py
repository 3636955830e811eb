"""KL divergence and discretized Gaussian likelihood, the terms of the variational bound."""

import math

import numpy as np  # noqa: F401 (the original offers it by star import)
import torch as th


def normal_kl(
    mean1: th.Tensor | float, logvar1: th.Tensor | float, mean2: th.Tensor | float, logvar2: th.Tensor | float
) -> th.Tensor:
    """
    KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), elementwise, in nats.

    The arguments are tensors that broadcast against each other, or numbers.

    :return: a tensor of the broadcast shape.
    :raises TypeError: if no argument is a tensor.
    """
    tensors = [v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, th.Tensor)]
    if not tensors:
        raise TypeError("normal_kl needs at least one tensor among its arguments")
    # th.exp() takes tensors only; numbers get the dtype and device of the tensor
    logvar1, logvar2 = (v if isinstance(v, th.Tensor) else tensors[0].new_full((), v) for v in (logvar1, logvar2))
    # -1 first, as in the original: near zero the terms cancel, and rounding depends on their order
    return 0.5 * (-1.0 + logvar2 - logvar1 + th.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """
    Standard normal CDF, elementwise: Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2.

    Not erf: the published likelihoods use this approximation.
    """
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor) -> th.Tensor:
    """
    Log-probability of 8-bit values under a discretized Gaussian (Ho et al. 2020, arXiv 2006.11239, equation 13).

    A value k in 0..255 is x = k / 127.5 - 1, with the bin x +- 1/255; the outermost bins extend to infinity.

    :param x: values in [-1, 1], any shape.
    :param means: means, x's shape.
    :param log_scales: logarithms of the standard deviations, x's shape.
    :return: nats, x's shape.
    :raises ValueError: if the shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        found = f"{tuple(x.shape)}, {tuple(means.shape)} and {tuple(log_scales.shape)}"
        raise ValueError(f"x, means and log_scales must have the same shape, not {found}")
    centered = x - means
    inv_stdv = th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    probability = th.where(x < -0.999, cdf_upper, th.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower))
    return th.log(probability.clamp(min=1e-12))  # far from the mean, float32 underflows to 0
