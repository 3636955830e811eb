"""
Enlarge the images of an npz file, such as image_sample.py writes, by a trained super-resolution model.

Sample i is made from image i; where there are more samples than images, the images are used again in order.
"""

import torch as th

from improved_diffusion import dist_util
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.inference.generate import load_base_samples
from improved_diffusion.runs import begin, create_trained, sample, sampling_defaults
from improved_diffusion.script_util import (
    extra_model_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)

MODEL_FLAGS = {**sr_model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    begin(args)
    trained = create_trained(args, sr_create_model_and_diffusion, MODEL_FLAGS)
    base_images, base_labels = load_base_samples(
        args.base_samples,
        size=args.small_size,
        channels=args.image_channels,
        num_classes=args.num_classes if args.class_cond else None,
    )

    def conditions(numbers, _):
        chosen = [i % len(base_images) for i in numbers]
        low_res = th.from_numpy(base_images[chosen]).float().permute(0, 3, 1, 2) / 127.5 - 1
        kwargs = {"low_res": low_res.to(dist_util.dev())}
        if args.class_cond:
            kwargs["y"] = th.from_numpy(base_labels[chosen]).to(dist_util.dev())
        return kwargs

    said = f"creating {args.num_samples} samples from {len(base_images)} images..."
    sample(args, trained, args.large_size, conditions, said)


def create_argparser():
    return create_parser({**sampling_defaults(), "base_samples": "", **MODEL_FLAGS}, description=__doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
