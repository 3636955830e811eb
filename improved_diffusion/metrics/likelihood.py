"""The variational bound on the negative log-likelihood of images, in bits per dimension."""

import functools
import math
from typing import Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..inference.generate import Finite, noise_of, not_finite
from ..inference.parts import Parts
from ..utils.progress import Progress, count_calls
from ..utils.streams import counted
from .estimate import PILOT_IMAGES, estimate_bpd, importance_weights, log_bins, pilot_evaluations, pilot_sums

TERMS = ("vb", "mse", "xstart_mse")
PILOT_NUMBERS = 2**31  # the pilot's noise is that of images behind all others: p must be independent of the estimate's


@th.inference_mode()
def evaluate_bpd(
    model, diffusion, data, clip_denoised: bool = True, seed: int | None = None, parts: Parts | None = None,
    model_path: str = "the model", use_fp16: bool = False, estimate: int = 0,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """
    Evaluate the variational bound (eq. 4-7 of the paper). A collective: each rank has every world_size()-th image.

    :param data: an iterator from load_data_once().
    :param seed: makes each image's noise depend on its index alone.
    :param parts: where to keep the sums batch by batch, and continue.
    :param model_path, use_fp16: of the network, for messages.
    :param estimate: evaluations of the network an image, 4 or more, by estimate.py; 0 = every timestep.
    :return: ({"total_bpd", "prior_bpd", "squared" (of total_bpd): tensors [], "vb", "mse", "xstart_mse": tensors [T],
             noisiest timestep first; estimates have "variance" [] and "p" [T] instead of the last two},
             number of images): float64 means over all images, on the CPU.
    :raises InputError: if the bound is not finite.
    """
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    if parts is not None and parts.done:
        sums, p, done = parts.values["sums"], parts.values["p"], parts.done
    else:
        p = None
        if estimate:
            found = _pilot(model, diffusion, data, clip_denoised, seed)
            if not np.isfinite(found).all():
                raise not_finite(model_path, use_fp16)
            p = th.from_numpy(importance_weights(found, diffusion.num_timesteps))
        arrays, scalars = ("vb",) if estimate else TERMS, ("total_bpd", "prior_bpd", "squared")
        sums = {name: th.zeros(diffusion.num_timesteps, dtype=th.float64) for name in arrays}
        sums |= {name: th.zeros((), dtype=th.float64) for name in (*scalars, *["variance"] * bool(estimate))}
        done = 0  # images on all ranks
    if done:
        data.skip(max(0, -(-(done - rank) // world)))  # this rank's images are those of index rank, rank + world, ...
    evaluate = diffusion.calc_bpd_loop
    if p is not None:
        evaluate = functools.partial(estimate_bpd, diffusion, p=p.numpy(), evaluations=estimate)
    steps = len(data) * (estimate or diffusion.num_timesteps)
    with Progress("evaluating", steps, "steps", logger.log, show=rank == 0) as progress:
        model = Finite(count_calls(model, progress))
        for _ in range(max(dist_util.all_gather_object(len(data)))):
            batch, cond = next(data, (th.empty(0), {}))  # a rank may have no image left
            added = {name: th.zeros_like(value, device=device) for name, value in sums.items()}
            if len(batch):
                batch = batch.to(device)
                cond = {k: v.to(device) for k, v in cond.items()}
                first = done + (rank - done) % world  # the smallest index of this rank's that is not done
                noise_fn = noise_of(seed, range(first, first + world * len(batch), world))
                kwargs = dict(clip_denoised=clip_denoised, model_kwargs=cond, noise_fn=noise_fn)
                metrics = {name: value.double() for name, value in evaluate(model, batch, **kwargs).items()}
                metrics["squared"] = metrics["total_bpd"] ** 2
                added = {name: metrics[name].sum(dim=0) for name in sums}
            broken = dist_util.any_rank(not model.so_far)  # on the CPU, where missing ranks are named
            done += int(dist_util.all_reduce_sum(th.tensor(len(batch), device=device)))
            sums = {name: value + dist_util.all_reduce_sum(added[name]).cpu() for name, value in sums.items()}
            if broken or not all(value.isfinite().all() for value in sums.values()):
                raise not_finite(model_path, use_fp16)
            if parts is not None:
                parts.save(done, values={"sums": sums, "p": p})
            means = _means(sums, done)
            bpd, error = means["total_bpd"].item(), _standard_error(means, done)
            logger.log(f"done {counted(done, 'sample')}: bpd={bpd} +- {error:.4f}")
    return _means(sums, done) | ({} if p is None else {"p": p}), done


def summarize(means: dict[str, th.Tensor], count: int) -> dict[str, float]:
    """
    What evaluate_bpd() finds, in numbers.

    :return: "bpd"; "standard_error" over the images (NaN of one image); "prior" and "t0", the first and the last term
             of the bound; of an estimate "standard_error_of_estimate", the part by timesteps and noise. All in bits
             per dimension. "images", their number.
    """
    found = {"bpd": means["total_bpd"].item(), "standard_error": _standard_error(means, count)}
    if "variance" in means:
        found["standard_error_of_estimate"] = math.sqrt(means["variance"].item() / count)
    return found | {"prior": means["prior_bpd"].item(), "t0": means["vb"][-1].item(), "images": count}


def _means(sums, count):
    return {name: value / count for name, value in sums.items()}


def _standard_error(means, count):
    variance = means["squared"].item() - means["total_bpd"].item() ** 2
    return math.sqrt(max(variance, 0) / (count - 1)) if count > 1 else math.nan


def _pilot(model, diffusion, data, clip_denoised, seed):
    """pilot_sums() over the first images of all ranks. A collective."""
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    count = min(PILOT_IMAGES, sum(dist_util.all_gather_object(len(data.dataset))))
    numbers = np.arange(rank, count, world)
    sums = np.zeros((2, len(log_bins(diffusion.num_timesteps)) - 1))
    for batch, cond in data.first(len(numbers)):
        mine, numbers = numbers[: len(batch)], numbers[len(batch) :]
        cond = {k: v.to(device) for k, v in cond.items()}
        noise_fn = noise_of(seed, (PILOT_NUMBERS + mine).tolist())
        kwargs = dict(clip_denoised=clip_denoised, model_kwargs=cond, noise_fn=noise_fn)
        sums += pilot_sums(diffusion, model, batch.to(device), mine, **kwargs)
    dist_util.barrier()
    evaluations = pilot_evaluations(diffusion.num_timesteps, count)
    logger.log(f"pilot: {evaluations} evaluations on {count} images, for the timesteps' probabilities")
    return dist_util.all_reduce_sum(th.from_numpy(sums).to(device)).cpu().numpy()
