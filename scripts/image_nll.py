"""
Evaluate the likelihood of images under a trained model: the variational bound, in bits per dimension.

Prints the total, and writes the mean of each term by timestep, noisiest first, to vb_terms.npz, mse_terms.npz and
xstart_mse_terms.npz. Each image counts once.

    python scripts/image_nll.py --model_path runs/a/ema_0.9999_200000.pt --data_dir test --batch_size 16
"""

if __name__ == "__main__" and not __package__:
    import _start  # noqa: F401

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.inference.arrays import save_arrays
from improved_diffusion.inference.parts import Parts
from improved_diffusion.metrics.likelihood import evaluate_bpd
from improved_diffusion.options import LikelihoodScriptOptions
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.utils.streams import counted


def main():
    flags = parse_flags(create_argparser(), LikelihoodScriptOptions())
    dist_util.setup_dist()
    dist_util.seed_everything(flags.options.compute.seed)
    this_run, model, diffusion = load_trained(flags, create_model_and_diffusion)
    options = this_run.options
    data = options.call(load_data_once, limit=options.likelihood.num_samples, class_names=this_run.class_names)

    images = sum(dist_util.all_gather_object(data.dataset.checksum()))
    contents = dict(weights=this_run.weights, class_names=this_run.class_names, images=images)
    with logging_to(options.general.log_dir, this_run.notes), Parts(options, **contents) as parts:
        logger.log("evaluating...")
        means, count = options.call(evaluate_bpd, model=model, diffusion=diffusion, data=data, parts=parts)
        if dist_util.rank() == 0:
            logger.log(f"total bpd over {counted(count, 'image')}: {means.pop('total_bpd').item():.4f} bits/dim")
            for name, terms in means.items():
                logger.log(f"saved {save_arrays(f'{name}_terms.npz', terms.numpy())}")


def create_argparser():
    return create_parser(LikelihoodScriptOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
