"""
Draw samples from a trained model and write them to samples_NxHxWxC.npz, with a picture of them beside it.
"""

import torch as th

from improved_diffusion import dist_util
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.inference.generate import draw_labels
from improved_diffusion.runs import begin, create_trained, sample, sampling_defaults
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    extra_model_defaults,
    model_and_diffusion_defaults,
)

MODEL_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    begin(args)
    trained = create_trained(args, create_model_and_diffusion, MODEL_FLAGS)
    num_classes = len(trained.class_names or ()) or args.num_classes  # it may have room for more than it was trained on

    def conditions(numbers, noise_fn):
        if not args.class_cond:
            return {}
        if trained.labels is not None:
            return {"y": th.from_numpy(trained.labels[numbers]).to(dist_util.dev())}
        return {"y": draw_labels(num_classes, len(numbers), noise_fn)}

    sample(args, trained, args.image_size, conditions, "sampling...")


def create_argparser():
    return create_parser({**sampling_defaults(), "classes": "", **MODEL_FLAGS}, description=__doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
