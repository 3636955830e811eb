"""
Draw samples from a trained model and write them to samples_NxHxWxC.npz.
"""

from improved_diffusion import dist_util, logger
from improved_diffusion.command_line import create_parser, parse_flags, run
from improved_diffusion.sample_util import draw_labels, for_inference, generate, save_samples
from improved_diffusion.script_util import (
    args_to_dict,
    compute_defaults,
    create_model_and_diffusion,
    extra_model_defaults,
    model_and_diffusion_defaults,
)
from improved_diffusion.weights import load_weights

MODEL_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}


def main():
    args = parse_flags(create_argparser())
    dist_util.setup_dist()
    dist_util.seed_everything(args.seed)

    model, diffusion = create_model_and_diffusion(**args_to_dict(args, MODEL_FLAGS))
    load_weights(model, args.model_path)
    model = for_inference(model, batch_size=args.batch_size, **args_to_dict(args, compute_defaults()))

    def conditions(numbers, noise_fn):
        return {"y": draw_labels(args.num_classes, len(numbers), noise_fn)} if args.class_cond else {}

    logger.configure()
    logger.log(dist_util.describe())
    logger.log("sampling...")
    images, labels = generate(
        diffusion,
        model,
        shape=(args.image_channels, args.image_size, args.image_size),
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
    defaults = dict(clip_denoised=True, num_samples=10000, batch_size=16, use_ddim=False, model_path="")
    return create_parser({**defaults, **compute_defaults(), **MODEL_FLAGS}, description=__doc__)


if __name__ == "__main__":
    run(main)
