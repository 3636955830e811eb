"""
The Inception score of samples (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL divergence of a classifier's
distribution for each image from their mean.
"""

import torch as th

from ..utils.errors import InputError
from .frechet import Features

SPLIT = 5000  # images; the score depends on it


def inception_score(logits: Features, split: int = SPLIT) -> float:
    """
    The mean of the scores of successive splits, as in OpenAI's evaluator.

    :param logits: [N, K]; by convention of Inception without bias.
    :param split: images per split; the last one may have fewer.
    :raises InputError: if there are none, or one is not finite.
    """
    x = th.as_tensor(logits).detach().to("cpu", th.float64)
    if x.dim() != 2 or len(x) == 0 or not x.isfinite().all():
        raise InputError(f"logits of shape {tuple(x.shape)}: give [N, K], finite")
    scores = []
    for log_p in x.log_softmax(1).split(split):
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).nansum(1).mean().exp())  # 0 log 0 = 0
    return float(th.stack(scores).mean())
