"""
Measure the likelihood of a folder's images under a trained model, as a bound in bits per dimension.

Prints the total, and writes the mean of each term by timestep, noisiest first, to vb_terms.npz,
mse_terms.npz and xstart_mse_terms.npz. Each image counts once.
"""

import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.inference.generate import SampleNoise, save_arrays
from improved_diffusion.runs import begin, create_trained, data_defaults, data_flags, logging_to
from improved_diffusion.script_util import (
    compute_defaults,
    create_model_and_diffusion,
    extra_model_defaults,
    model_and_diffusion_defaults,
)
from improved_diffusion.utils.progress import Progress, counting_calls

MODEL_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}
TERMS = ("vb", "mse", "xstart_mse")


def main():
    args = parse_flags(create_argparser())
    begin(args)
    trained = create_trained(args, create_model_and_diffusion, MODEL_FLAGS)
    data = load_data_once(
        image_size=args.image_size, limit=args.num_samples, class_names=trained.class_names, **data_flags(args)
    )

    with logging_to(args, trained.notes):
        logger.log("evaluating...")
        with Progress("evaluating", len(data) * trained.diffusion.num_timesteps, "steps") as progress:
            model = counting_calls(trained.model, progress)
            run_bpd_evaluation(model, trained.diffusion, data, args.clip_denoised, args.seed)


@th.inference_mode()
def run_bpd_evaluation(model, diffusion, data, clip_denoised, seed=None):
    # tensors from the start, since a rank may have no image at all
    sums = {key: th.zeros(diffusion.num_timesteps, dtype=th.float64, device=dist_util.dev()) for key in TERMS}
    sums["total_bpd"] = th.zeros((), dtype=th.float64, device=dist_util.dev())
    count = 0
    for batch, cond in data:
        batch = batch.to(dist_util.dev())
        cond = {k: v.to(dist_util.dev()) for k, v in cond.items()}
        # this rank has every world_size()-th image of the folder
        numbers = range(count, count + len(batch))
        noise_fn = th.randn_like
        if seed is not None:
            noise_fn = SampleNoise(seed, [dist_util.rank() + dist_util.world_size() * n for n in numbers])
        metrics = diffusion.calc_bpd_loop(
            model, batch, clip_denoised=clip_denoised, model_kwargs=cond, noise_fn=noise_fn
        )
        for key in sums:
            sums[key] += metrics[key].double().sum(dim=0)
        count += len(batch)
        logger.log(f"done {count} samples: bpd={sums['total_bpd'].item() / count}")

    total = dist_util.all_reduce_sum(th.tensor(count, device=dist_util.dev())).item()
    means = {key: dist_util.all_reduce_sum(value) / total for key, value in sums.items()}
    if dist_util.rank() == 0:
        logger.log(f"total bpd over {total} images: {means['total_bpd'].item():.4f} bits/dim")
        for key in TERMS:
            logger.log(f"saved {save_arrays(f'{key}_terms.npz', means[key].cpu().numpy())}")


def create_argparser():
    defaults = dict(clip_denoised=True, num_samples=1000, batch_size=1, model_path="")
    flags = {**defaults, **data_defaults(), **compute_defaults(), **MODEL_FLAGS}
    return create_parser(flags, description=__doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
