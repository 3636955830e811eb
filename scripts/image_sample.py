"""
Draw samples from a trained model. They go to samples_NxHxWxC.npz (arr_0: uint8 images, arr_1: labels), with a picture
beside it.

    python scripts/image_sample.py --model_path runs/a/ema_0.9999_200000.pt --num_samples 16 --timestep_respacing 100
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import functools

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.cost import log_cost
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.inference.arrays import refuse_old_images, write_samples
from improved_diffusion.inference.generate import chosen_labels, generate, label_conditions
from improved_diffusion.inference.parts import Parts
from improved_diffusion.options import SampleOptions
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.training.describe import describe_classes


def main():
    flags = parse_flags(create_argparser(), SampleOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run, model, diffusion = load_trained(flags, create_model_and_diffusion)
    options, class_names = this_run.options, this_run.class_names
    labels, num_samples = None, options.sampling.num_samples
    if options.sampling.classes:
        count = options.sampling.num_samples if "num_samples" in flags.given else None
        labels = chosen_labels(options.sampling.classes, count, this_run.num_labels, class_names)
        num_samples = len(labels)

    with (
        logging_to(options.general.log_dir, this_run.notes),
        Parts(options, weights=this_run.weights, class_names=class_names) as parts,
    ):
        if options.model.class_cond and class_names:
            logger.log(f"classes: {describe_classes(class_names, only=labels)}")
        if options.output.save_images and parts.done < num_samples:
            dist_util.broadcast_from_rank_0(refuse_old_images)
        logger.log("sampling...")
        size = options.model.image_size
        images, drawn = options.call(
            generate,
            diffusion=diffusion,
            model=model,
            shape=(options.model.image_channels, size, size),
            conditions=label_conditions(labels, this_run.num_labels),
            num_samples=num_samples,
            sampler=options.sampling.sampler_name,
            sampler_options=options.sampling.sampler_options,
            parts=parts,
            after_first_batch=functools.partial(log_cost, flags.given, options, diffusion),
        )
        if dist_util.rank() == 0:
            write_samples(images, drawn, class_names, options.output.save_images)


def create_argparser():
    return create_parser(SampleOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
