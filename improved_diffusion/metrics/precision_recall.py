"""
Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991): the share of samples within the reference's
manifold, and of the reference within that of the samples. A manifold is the union of balls around each feature that
reach to its k-th nearest neighbour.
"""

import torch as th

from ..utils.errors import InputError
from .frechet import Features, check_features

NEIGHBOURS = 3
CHUNK = 512  # rows of distances in memory at once


def precision_recall(samples: Features, reference: Features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """
    Both in [0, 1], from distances in float64. Memory for two copies of the features and a few times CHUNK rows of
    distances. Both depend on the sizes of the sets: compare sets of the same sizes.

    :param samples, reference: features [N, D], of any two sizes.
    :param k: the neighbour that a ball reaches to, itself excluded; it is within.
    :raises InputError: if shapes do not fit, a set has k features or fewer, or a feature is not finite.
    """
    x, y = check_features(samples, reference)
    if min(len(x), len(y)) <= k:
        raise InputError(f"{min(len(x), len(y))} features: {k} neighbours need more than {k}")
    centre = y.mean(0)  # differences of smaller numbers round less
    x, y = x - centre, y - centre
    return _share_within(x, y, k), _share_within(y, x, k)


def _share_within(x, of, k):
    """The share of x [N, D] within the manifold of `of` [M, D]."""
    radii = []
    for start in range(0, len(of), CHUNK):
        distances = _squared_distances(of[start : start + CHUNK], of)
        distances.diagonal(start).fill_(th.inf)
        radii.append(distances.kthvalue(k, dim=1).values)
    within = [(_squared_distances(chunk, of) <= th.cat(radii)).any(1) for chunk in x.split(CHUNK)]
    return float(th.cat(within).double().mean())


def _squared_distances(a, b):
    """[n, D], [m, D] -> [n, m]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = squares - 2 * a @ b.T
    return distances.masked_fill_(distances < 1e-12 * squares, 0)  # equal features, but for rounding
