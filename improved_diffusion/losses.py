"""KL divergence and discretised Gaussian likelihood: the terms of the variational bound."""

import math

import numpy as np  # noqa: F401 (part of this module, as in the original)
import torch as th


def normal_kl(
    mean1: th.Tensor | float, logvar1: th.Tensor | float, mean2: th.Tensor | float, logvar2: th.Tensor | float
) -> th.Tensor:
    """
    KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), elementwise, in nats.

    The arguments broadcast against each other; numbers and tensors mix, but at
    least one argument is a tensor.

    :return: a tensor of the broadcast shape.
    :raises TypeError: if no argument is a tensor.
    """
    like = next((v for v in (mean1, logvar1, mean2, logvar2) if isinstance(v, th.Tensor)), None)
    if like is None:
        raise TypeError("normal_kl needs at least one tensor among its arguments")

    # exp() below wants tensors; a Python number takes dtype and device of its neighbours
    logvar1, logvar2 = (v if isinstance(v, th.Tensor) else like.new_full((), v) for v in (logvar1, logvar2))
    # near zero the terms cancel, and what is left depends on their order: -1 first, as published figures have it
    return 0.5 * (-1.0 + logvar2 - logvar1 + th.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * th.exp(-logvar2))


def approx_standard_normal_cdf(x: th.Tensor) -> th.Tensor:
    """
    The standard normal's cumulative distribution, by the tanh approximation
    Phi(x) ~ (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, elementwise.

    Likelihoods reported for these models use the approximation, so erf would
    change them.
    """
    return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: th.Tensor, *, means: th.Tensor, log_scales: th.Tensor) -> th.Tensor:
    """
    Log-probability of 8-bit values under a Gaussian cut into 256 bins
    (Ho et al. 2020, arXiv 2006.11239, equation 13).

    A value k of 0..255 is given as x = k / 127.5 - 1 and owns the bin x +- 1/255;
    the two outermost bins reach to infinity, so the 256 of them sum to one.

    :param x: target values in [-1, 1], any shape.
    :param means: the Gaussian's means, shape of x.
    :param log_scales: logarithms of its standard deviations, shape of x.
    :return: log-probabilities in nats, shape of x.
    :raises ValueError: if the shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"x, means and log_scales must have one shape, not {tuple(x.shape)}, "
            f"{tuple(means.shape)} and {tuple(log_scales.shape)}"
        )
    centered = x - means
    inv_stdv = th.exp(-log_scales)
    cdf_upper = approx_standard_normal_cdf(inv_stdv * (centered + 1.0 / 255.0))
    cdf_lower = approx_standard_normal_cdf(inv_stdv * (centered - 1.0 / 255.0))
    probability = th.where(x < -0.999, cdf_upper, th.where(x > 0.999, 1.0 - cdf_lower, cdf_upper - cdf_lower))
    return th.log(probability.clamp(min=1e-12))  # a bin far from the mean has probability 0 in float32
