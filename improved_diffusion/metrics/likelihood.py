"""The variational bound on the negative log-likelihood of images, in bits per dimension."""

from collections.abc import Callable
from typing import Any

import torch as th

from .. import dist_util, logger
from ..inference.generate import SampleNoise
from ..utils.progress import Progress, count_calls

TERMS = ("vb", "mse", "xstart_mse")


@th.inference_mode()
def evaluate_bpd(
    model, diffusion, data, clip_denoised: bool = True, seed: int | None = None
) -> tuple[dict[str, Any], int]:
    """
    Evaluate the variational bound (eq. 4-7 of the paper). A collective: each rank has every world_size()-th image.

    :param data: an iterator from load_data_once().
    :param seed: makes each image's noise depend on its index alone.
    :return: ({"total_bpd": tensor [], "vb", "mse", "xstart_mse": tensors [T], noisiest timestep first}, number of
             images): float64 means over all images, on the CPU.
    """
    device = dist_util.dev()
    # a rank may have no images
    sums = {name: th.zeros(diffusion.num_timesteps, dtype=th.float64, device=device) for name in TERMS}
    sums["total_bpd"] = th.zeros((), dtype=th.float64, device=device)
    count = 0
    steps = len(data) * diffusion.num_timesteps
    with Progress("evaluating", steps, "steps", logger.log, show=dist_util.rank() == 0) as progress:
        model = count_calls(model, progress)
        for batch, cond in data:
            batch = batch.to(device)
            cond = {k: v.to(device) for k, v in cond.items()}
            noise_fn: Callable = th.randn_like
            if seed is not None:
                numbers = range(count, count + len(batch))
                noise_fn = SampleNoise(seed, [dist_util.rank() + dist_util.world_size() * n for n in numbers])
            kwargs = dict(clip_denoised=clip_denoised, model_kwargs=cond, noise_fn=noise_fn)
            metrics = diffusion.calc_bpd_loop(model, batch, **kwargs)
            for name in sums:
                sums[name] += metrics[name].double().sum(dim=0)
            count += len(batch)
            logger.log(f"done {count} samples: bpd={sums['total_bpd'].item() / count}")
    dist_util.barrier()  # on the CPU, where missing ranks are named
    total = int(dist_util.all_reduce_sum(th.tensor(count, device=device)))
    return {name: (dist_util.all_reduce_sum(value) / total).cpu() for name, value in sums.items()}, total
