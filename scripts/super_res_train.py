"""
Train a super-resolution model on images: it enlarges them from --small_size to --large_size.

    python scripts/super_res_train.py --data_dir photos --large_size 256 --small_size 64 --log_dir runs/large
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import functools

from improved_diffusion import dist_util
from improved_diffusion.cli.dry_run import print_dry_run
from improved_diffusion.cli.loop import train_run
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.cli.run_config import resumed
from improved_diffusion.image_datasets import load_data, load_superres_data, low_res
from improved_diffusion.inference.preview import create_preview
from improved_diffusion.metrics.validation import create_validation
from improved_diffusion.options import SuperResTrainOptions
from improved_diffusion.script_util import configure_compute, sr_create_model_and_diffusion


def main():
    flags = parse_flags(create_argparser(), SuperResTrainOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run = resumed(flags)
    options = this_run.options
    if options.general.dry_run:
        return print_dry_run(this_run, sr_create_model_and_diffusion)

    model, diffusion = options.call(sr_create_model_and_diffusion)
    configure_compute(model, use_bf16=options.compute.use_bf16, compile=options.compute.compile)
    sizes = dict(large_size=options.model.large_size, small_size=options.model.small_size)
    data = load_superres_data(**sizes, class_names=this_run.class_names, **options.arguments_of(load_data))
    enlarged_from = functools.partial(low_res, options.model.small_size)
    names = data.dataset.class_names
    held_out = create_validation(options, diffusion, names, enlarged_from)
    preview = create_preview(options, names, data.first)  # of the first images
    train_run(this_run, sr_create_model_and_diffusion, model, diffusion, data, preview, [held_out])


def create_argparser():
    return create_parser(SuperResTrainOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
