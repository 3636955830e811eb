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
from improved_diffusion.cli.estimate import memory_warnings
from improved_diffusion.cli.loop import create_loop
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.run_config import resumed, save_config
from improved_diffusion.cli.run_folder import claim_folder
from improved_diffusion.image_datasets import load_data
from improved_diffusion.inference.preview import create_preview
from improved_diffusion.metrics.sample_distance import create_sample_distance
from improved_diffusion.metrics.validation import create_validation
from improved_diffusion.options import TrainOptions
from improved_diffusion.script_util import configure_compute, create_model_and_diffusion
from improved_diffusion.train_util import get_blob_logdir
from improved_diffusion.training.describe import log_start
from improved_diffusion.training.resume import open_checkpoint


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
    held_out = create_validation(options, diffusion, data.dataset.class_names)
    samples = create_sample_distance(options, data.dataset.class_names)
    checkpoint = options.call(open_checkpoint, model=model)

    notes = [*this_run.notes, *memory_warnings(options, create_model_and_diffusion)]
    claim = claim_folder(checkpoint, options.general.overwrite)
    with logging_to(options.general.log_dir, notes, claim):
        preview = create_preview(options, data.dataset.class_names)
        loop = create_loop(options, model, diffusion, data, checkpoint, preview, [held_out, samples])
        save_config(get_blob_logdir(), "image_train", options, data.dataset.class_names)
        log_start(loop, data.dataset)
        loop.draw_missing_preview()
        loop.run_loop()


def create_argparser():
    return create_parser(TrainOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
