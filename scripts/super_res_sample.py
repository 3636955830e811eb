"""
Enlarge the images of an npz file, such as image_sample.py writes, by a trained super-resolution model.

Sample i is made from image i; where there are more samples than images, the images are used again in order.
"""

import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.command_line import create_parser, parse_flags, run
from improved_diffusion.sample_util import for_inference, generate, load_base_samples, save_samples
from improved_diffusion.script_util import (
    args_to_dict,
    compute_defaults,
    extra_model_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.weights import load_weights

MODEL_FLAGS = {**sr_model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    dist_util.setup_dist()
    dist_util.seed_everything(args.seed)

    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(args, MODEL_FLAGS))
    base_images, base_labels = load_base_samples(
        args.base_samples,
        size=args.small_size,
        channels=args.image_channels,
        num_classes=args.num_classes if args.class_cond else None,
    )
    load_weights(model, args.model_path)
    model = for_inference(model, batch_size=args.batch_size, **args_to_dict(args, compute_defaults()))

    def conditions(numbers, _):
        chosen = [i % len(base_images) for i in numbers]
        low_res = th.from_numpy(base_images[chosen]).float().permute(0, 3, 1, 2) / 127.5 - 1
        kwargs = {"low_res": low_res.to(dist_util.dev())}
        if args.class_cond:
            kwargs["y"] = th.from_numpy(base_labels[chosen]).to(dist_util.dev())
        return kwargs

    logger.configure()
    logger.log(dist_util.describe())
    logger.log(f"creating {args.num_samples} samples from {len(base_images)} images...")
    images, labels = generate(
        diffusion,
        model,
        shape=(args.image_channels, args.large_size, args.large_size),
        num_samples=args.num_samples,
        batch_size=args.batch_size,
        conditions=conditions,
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
        seed=args.seed,
    )
    if dist_util.rank() == 0:
        logger.log(f"saved {save_samples(images, labels)}")


def create_argparser():
    defaults = dict(
        clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, base_samples="", model_path=""
    )
    return create_parser({**defaults, **compute_defaults(), **MODEL_FLAGS}, description=__doc__)


if __name__ == "__main__":
    run(main)
