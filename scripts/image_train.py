"""
Train a diffusion model on images.

    python scripts/image_train.py --data_dir photos --image_size 64 --log_dir runs/photos

Training writes checkpoints, a log and previews to --log_dir, until --max_steps or a signal. The same command with
--resume_checkpoint auto continues it.
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

from improved_diffusion import dist_util
from improved_diffusion.cli.dry_run import print_dry_run
from improved_diffusion.cli.loop import train_run
from improved_diffusion.cli.parser import create_parser, parse_flags, run
from improved_diffusion.cli.run_config import resumed
from improved_diffusion.image_datasets import load_data
from improved_diffusion.inference.preview import create_preview
from improved_diffusion.metrics.sample_distance import create_sample_distance
from improved_diffusion.metrics.validation import create_validation
from improved_diffusion.options import TrainOptions
from improved_diffusion.script_util import configure_compute, create_model_and_diffusion


def main():
    flags = parse_flags(create_argparser(), TrainOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run = resumed(flags)
    options = this_run.options
    if options.general.dry_run:
        return print_dry_run(this_run, create_model_and_diffusion)

    model, diffusion = options.call(create_model_and_diffusion)
    configure_compute(model, use_bf16=options.compute.use_bf16, compile=options.compute.compile)
    data = options.call(load_data, class_names=this_run.class_names)
    names = data.dataset.class_names
    measures = create_validation(options, diffusion, names), create_sample_distance(options, names)
    preview = create_preview(options, names)
    train_run(this_run, create_model_and_diffusion, model, diffusion, data, preview, measures)


def create_argparser():
    return create_parser(TrainOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
