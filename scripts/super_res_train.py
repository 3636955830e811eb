"""
Train a super-resolution model on a folder of images.
"""

from improved_diffusion import dist_util, logger
from improved_diffusion.command_line import create_parser, parse_flags, run
from improved_diffusion.image_datasets import load_superres_data
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.script_util import (
    args_to_dict,
    compute_defaults,
    configure_compute,
    extra_model_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
    train_loop_defaults,
)
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.weights import load_weights

MODEL_FLAGS = {**sr_model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    dist_util.setup_dist()
    dist_util.seed_everything(args.seed)

    model, diffusion = sr_create_model_and_diffusion(**args_to_dict(args, MODEL_FLAGS))
    if args.resume_checkpoint not in ("", "auto"):  # the second can be looked for when there is a log
        load_weights(model, args.resume_checkpoint, flag="resume_checkpoint")
    configure_compute(model, use_bf16=args.use_bf16, compile=args.compile)
    data = load_superres_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        large_size=args.large_size,
        small_size=args.small_size,
        class_cond=args.class_cond,
        image_channels=args.image_channels,
        num_classes=args.num_classes,
        num_workers=args.num_workers,
    )

    logger.configure()
    logger.log(dist_util.describe())
    logger.log("training...")
    TrainLoop(
        model=model.to(dist_util.dev()),
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        flags=vars(args),
        **args_to_dict(args, train_loop_defaults()),
    ).run_loop()


def create_argparser():
    defaults = dict(data_dir="", schedule_sampler="uniform", num_workers=-1, **train_loop_defaults())
    return create_parser({**defaults, **compute_defaults(), **MODEL_FLAGS}, description=__doc__)


if __name__ == "__main__":
    run(main)
