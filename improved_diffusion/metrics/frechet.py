"""
The Fréchet distance of two sets of features, each taken for a normal distribution (Dowson & Landau 1982; Heusel et al.
2017, arXiv 1706.08500): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With Inception's features it is the FID.
"""

from typing import TypeAlias

import numpy as np
import torch as th

from ..utils.errors import InputError

Features: TypeAlias = "th.Tensor | np.ndarray"


class Moments:
    """
    Mean and covariance of features that arrive in batches: memory for one [D, D], whatever their number.

    >>> moments = Moments()
    >>> for batch in batches:
    ...     moments.update(network(batch))  # [n, D]
    >>> frechet_distance(moments, other_features)
    """

    def __init__(self):
        self.count = 0
        self.mean = self.scatter = th.zeros(0, dtype=th.float64)  # [D]; [D, D], the sum of (x - mean)(x - mean)^T

    def update(self, features: Features) -> None:
        """
        :param features: [n, D] of any dtype and device; n may be 0.
        :raises InputError: if the shape is another, D is not that of earlier batches, or a feature is not finite.
        """
        x = _checked(features)
        if len(x):
            mean = x.mean(0)
            self._add(len(x), mean, (x - mean).T @ (x - mean))

    def merge(self, other: "Moments") -> None:
        """Add the features of another, such as another rank's. :raises InputError: if D differs."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count, mean, scatter):
        if self.count == 0:
            self.mean, self.scatter = th.zeros_like(mean), th.zeros_like(scatter)
        elif mean.shape != self.mean.shape:
            raise InputError(f"features of {len(mean)} dimensions after those of {len(self.mean)}")
        # Chan et al. 1983: no difference of large sums, as E[x x^T] - m m^T would be
        shift, total = mean - self.mean, self.count + count
        self.scatter = self.scatter + scatter + th.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def covariance(self) -> th.Tensor:
        """Unbiased, float64 [D, D]. :raises InputError: for fewer than two features."""
        if self.count < 2:
            raise InputError(f"{self.count} features: a covariance needs 2 or more")
        return self.scatter / (self.count - 1)


def frechet_distance(a: "Features | Moments | tuple", b: "Features | Moments | tuple") -> float:
    """
    The distance, in float64 on the CPU. It is biased upwards in small sets; compare sets of the same size.

    :param a, b: features [N, D], (mean [D], covariance [D, D]), or Moments.
    :raises InputError: if shapes do not fit, a set has fewer than two features, or a value is not finite.
    """
    (mean1, cov1), (mean2, cov2) = _moments_of(a), _moments_of(b)
    if len(mean1) != len(mean2):
        raise InputError(f"features of {len(mean1)} and of {len(mean2)} dimensions have no distance")
    # The eigenvalues of C1 C2 are the squares of these: no root of a rounding error where C1 or C2 is singular.
    roots = th.linalg.svdvals(_root(cov1) @ _root(cov2))
    found = float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots.sum())
    return max(found, 0.0)  # rounding may be below 0


def check_features(a: Features, b: Features) -> tuple[th.Tensor, th.Tensor]:
    """
    Two sets of features [N, D] and [M, D], as float64 on the CPU.

    :raises InputError: if shapes do not fit, a set has fewer than two features, or one is not finite.
    """
    x, y = _checked(a), _checked(b)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions have no distance")
    if min(len(x), len(y)) < 2:
        raise InputError(f"sets of {len(x)} and {len(y)} features: a distance needs 2 or more of each")
    return x, y


def _checked(features):
    x = _float64(features)
    if x.dim() != 2:
        raise InputError(f"features of shape {tuple(x.shape)}: give [N, D]")
    if not x.isfinite().all():
        raise InputError("features are not finite")
    return x


def _moments_of(value):
    if isinstance(value, tuple):
        mean, cov = map(_float64, value)
        if mean.dim() != 1 or cov.shape != 2 * mean.shape:
            raise InputError(f"mean {tuple(mean.shape)} and covariance {tuple(cov.shape)}: give [D] and [D, D]")
        if not (mean.isfinite().all() and cov.isfinite().all()):
            raise InputError("mean or covariance is not finite")
        return mean, cov
    if not isinstance(value, Moments):
        features, value = value, Moments()
        value.update(features)
    return value.mean, value.covariance()


def _root(cov):
    """The symmetric root of a covariance."""
    values, vectors = th.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _float64(values):
    return th.as_tensor(values).detach().to("cpu", th.float64)
