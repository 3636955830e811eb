"""
The kernel distance of two sets of features: the unbiased squared maximum mean discrepancy with the kernel
k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401). With Inception's features it is the KID.
"""

import numpy as np
import torch as th

from ..utils.errors import InputError
from .frechet import Features, check_features

SUBSETS, SUBSET_SIZE = 100, 1000
SEED = 2020  # of the subsets: those of torch-fidelity


def kernel_distance(
    a: Features, b: Features, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = SEED
) -> tuple[float, float]:
    """
    Mean and standard deviation of the distance over random subsets, in float64. The mean is unbiased in sets of any
    size, and so may be negative.

    :param a, b: features [N, D], of any two sizes.
    :param subset_size: features per subset of each set; default: SUBSET_SIZE, or half of the smaller set.
    :param seed: of the subsets. Torch's and numpy's global generators are not used.
    :raises InputError: if shapes do not fit, a set has fewer than two features, or a feature is not finite.
    """
    sets = check_features(a, b)
    smaller = min(map(len, sets))
    size = subset_size or max(2, min(SUBSET_SIZE, smaller // 2))
    if not 2 <= size <= smaller:
        raise InputError(f"subset_size {size}: give 2 to {smaller}, the features of the smaller set")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (set_[random.choice(len(set_), size, replace=False)] for set_ in sets)
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x, y):
    """Gretton et al. 2012, eq. 3, for [m, D] and [m, D]."""
    m = len(x)
    within = sum(k.sum() - k.trace() for k in (_kernel(x, x), _kernel(y, y)))
    return float(within / (m * (m - 1)) - 2 * _kernel(x, y).mean())


def _kernel(x: th.Tensor, y: th.Tensor) -> th.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
