"""The variational bound on the negative log-likelihood of images, in bits per dimension."""

from collections.abc import Callable
from typing import Any

import torch as th

from .. import dist_util, logger
from ..inference.generate import Finite, SampleNoise, not_finite
from ..inference.parts import Parts
from ..utils.progress import Progress, count_calls

TERMS = ("vb", "mse", "xstart_mse")


@th.inference_mode()
def evaluate_bpd(
    model, diffusion, data, clip_denoised: bool = True, seed: int | None = None, parts: Parts | None = None,
    model_path: str = "the model", use_fp16: bool = False,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """
    Evaluate the variational bound (eq. 4-7 of the paper). A collective: each rank has every world_size()-th image.

    :param data: an iterator from load_data_once().
    :param seed: makes each image's noise depend on its index alone.
    :param parts: where to keep the sums batch by batch, and continue.
    :param model_path, use_fp16: of the network, for messages.
    :return: ({"total_bpd": tensor [], "vb", "mse", "xstart_mse": tensors [T], noisiest timestep first}, number of
             images): float64 means over all images, on the CPU.
    :raises InputError: if the bound is not finite.
    """
    rank, world, device = dist_util.rank(), dist_util.world_size(), dist_util.dev()
    sums = {name: th.zeros(diffusion.num_timesteps, dtype=th.float64) for name in TERMS}
    sums["total_bpd"] = th.zeros((), dtype=th.float64)
    done = 0  # images on all ranks
    if parts is not None and parts.done:
        sums, done = parts.values, parts.done
        data.skip(max(0, -(-(done - rank) // world)))  # this rank's images are those of index rank, rank + world, ...
    steps = len(data) * diffusion.num_timesteps
    with Progress("evaluating", steps, "steps", logger.log, show=rank == 0) as progress:
        model = Finite(count_calls(model, progress))
        for _ in range(max(dist_util.all_gather_object(len(data)))):
            batch, cond = next(data, (th.empty(0), {}))  # a rank may have no image left
            added = {name: th.zeros_like(value, device=device) for name, value in sums.items()}
            if len(batch):
                batch = batch.to(device)
                cond = {k: v.to(device) for k, v in cond.items()}
                noise_fn: Callable = th.randn_like
                if seed is not None:
                    first = done + (rank - done) % world  # the smallest index of this rank's that is not done
                    noise_fn = SampleNoise(seed, range(first, first + world * len(batch), world))
                kwargs = dict(clip_denoised=clip_denoised, model_kwargs=cond, noise_fn=noise_fn)
                metrics = diffusion.calc_bpd_loop(model, batch, **kwargs)
                added = {name: metrics[name].double().sum(dim=0) for name in sums}
            broken = dist_util.any_rank(not model.so_far)  # on the CPU, where missing ranks are named
            done += int(dist_util.all_reduce_sum(th.tensor(len(batch), device=device)))
            sums = {name: value + dist_util.all_reduce_sum(added[name]).cpu() for name, value in sums.items()}
            if broken or not all(value.isfinite().all() for value in sums.values()):
                raise not_finite(model_path, use_fp16)
            if parts is not None:
                parts.save(done, values=sums)
            logger.log(f"done {done} sample{'s' * (done != 1)}: bpd={sums['total_bpd'].item() / done}")
    return {name: value / done for name, value in sums.items()}, done
