"""
Train a diffusion model on a folder of images.
"""

from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.image_datasets import load_data
from improved_diffusion.runs import begin, create_for_training, data_flags, train, training_defaults
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    extra_model_defaults,
    model_and_diffusion_defaults,
)

MODEL_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    begin(args)
    begun = create_for_training(args, create_model_and_diffusion, MODEL_FLAGS)
    data = load_data(image_size=args.image_size, class_names=begun.class_names, **data_flags(args))
    train(args, begun, data)


def create_argparser():
    return create_parser({**training_defaults(), **MODEL_FLAGS}, description=__doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
