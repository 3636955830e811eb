"""
Train a diffusion model on a folder of images.
"""

from improved_diffusion.command_line import create_parser, parse_flags, run
from improved_diffusion.image_datasets import load_data
from improved_diffusion.runs import begin, create_for_training, train
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    extra_model_defaults,
    model_and_diffusion_defaults,
    training_defaults,
)

MODEL_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    begin(args)
    begun = create_for_training(args, create_model_and_diffusion, MODEL_FLAGS)
    data = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
        image_channels=args.image_channels,
        num_classes=args.num_classes,
        num_workers=args.num_workers,
        pin_memory=args.pin_memory,
        random_flip=args.random_flip,
        class_names=begun.class_names,
    )
    train(args, begun, data)


def create_argparser():
    return create_parser({**training_defaults(), **MODEL_FLAGS}, description=__doc__)


if __name__ == "__main__":
    run(main)
