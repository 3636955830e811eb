"""
Enlarge images with a trained super-resolution model: those of an npz file such as image_sample.py writes, of a folder,
one image file, or packed images.

Sample i is made from image i: by default one of each. With more samples than images, the images repeat in order.

    python scripts/super_res_sample.py --model_path ema_0.9999_200000.pt --base_samples samples_16x64x64x3.npz
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import functools

import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.cost import log_cost
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.inference.arrays import load_base_samples, refuse_old_images, write_samples
from improved_diffusion.inference.generate import generate
from improved_diffusion.inference.parts import Parts
from improved_diffusion.options import SuperResSampleOptions
from improved_diffusion.script_util import sr_create_model_and_diffusion
from improved_diffusion.utils.streams import counted


def main():
    flags = parse_flags(create_argparser(), SuperResSampleOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run, model, diffusion = load_trained(flags, sr_create_model_and_diffusion)
    options = this_run.options
    base_images, base_labels = load_base_samples(
        options.sampling.base_samples,
        size=options.model.small_size,
        channels=options.model.image_channels,
        num_classes=options.model.num_classes if options.model.class_cond else None,
        num_samples=options.sampling.num_samples if "num_samples" in flags.given else None,
        class_names=this_run.class_names,
        skip_damaged=options.sampling.skip_damaged,
    )
    if "num_samples" not in flags.given:
        options = options.replace(num_samples=len(base_images))
    base = {"images": base_images} if base_labels is None else {"images": base_images, "labels": base_labels}

    def conditions(numbers, _):
        chosen = [i % len(base_images) for i in numbers]
        low_res = th.from_numpy(base_images[chosen]).float().permute(0, 3, 1, 2) / 127.5 - 1
        labels = {} if base_labels is None else {"y": th.from_numpy(base_labels[chosen]).to(dist_util.dev())}
        return {"low_res": low_res.to(dist_util.dev()), **labels}

    with (
        logging_to(options.general.log_dir, this_run.notes),
        Parts(options, weights=this_run.weights, base=base) as parts,
    ):
        if options.output.save_images and parts.done < options.sampling.num_samples:
            dist_util.broadcast_from_rank_0(refuse_old_images)
        count, size = counted(options.sampling.num_samples, "sample"), options.model.large_size
        logger.log(f"creating {count} from {counted(len(base_images), 'image')}...")
        images, labels = options.call(
            generate,
            diffusion=diffusion,
            model=model,
            shape=(options.model.image_channels, size, size),
            conditions=conditions,
            sampler=options.sampling.sampler_name,
            sampler_options=options.sampling.sampler_options,
            parts=parts,
            after_first_batch=functools.partial(log_cost, flags.given, options, diffusion),
        )
        if dist_util.rank() == 0:
            write_samples(images, labels, this_run.class_names, options.output.save_images)


def create_argparser():
    return create_parser(SuperResSampleOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
