"""
Evaluate the likelihood of images under a trained model: the variational bound, in bits per dimension.

Prints the total, its standard error, the prior's term and that of t = 0, and writes them to nll.json. Writes the mean
of each term by timestep, noisiest first, to vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz, and draws nll.png.
Each image counts once. --estimate 100 evaluates the network 100 times an image instead of once a timestep; its terms
and the probabilities of the timesteps are in estimate.npz.

    python scripts/image_nll.py --model_path runs/a/ema_0.9999_200000.pt --data_dir test --batch_size 16
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import numpy as np

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.inference.arrays import save_arrays, save_json, save_plot
from improved_diffusion.inference.parts import Parts
from improved_diffusion.metrics.likelihood import TERMS, evaluate_bpd, summarize
from improved_diffusion.metrics.plots import draw_terms
from improved_diffusion.options import LikelihoodScriptOptions
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.streams import counted

MANY, FEW = 1000, 100  # evaluations of the network an image


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
        logger.log(describe(options.likelihood, data.dataset.num_images, diffusion.num_timesteps))
        means, count = options.call(evaluate_bpd, model=model, diffusion=diffusion, data=data, parts=parts)
        if dist_util.rank() == 0:
            write(means, count, diffusion.timestep_map)


def describe(likelihood, num_images, num_timesteps):
    """What the evaluation costs, in words, and what costs less."""
    count, evaluations = min(num_images, likelihood.num_samples), likelihood.estimate or num_timesteps
    advice = f"; --estimate {FEW} takes {FEW} an image" if evaluations >= MANY and not likelihood.estimate else ""
    return f"evaluating {counted(count, 'image')}, the network {counted(evaluations, 'time')} each{advice}..."


def write(means, count, timesteps):
    found = summarize(means, count)
    part = f", {found['standard_error_of_estimate']:.4f} by the estimate alone" if "p" in means else ""
    logger.log(f"total bpd over {counted(count, 'image')}: {found['bpd']:.4f} bits/dim")
    logger.log(f"standard error: {found['standard_error']:.4f} bits/dim{part}")
    share = f"{found['t0'] / found['bpd']:.1%} of the bound"
    logger.log(f"prior: {found['prior']:.6f} bits/dim; t = 0: {found['t0']:.4f}, {share}")
    if "p" in means:
        arrays = dict(vb=means["vb"].numpy(), p=means["p"].numpy(), timesteps=np.array(timesteps))
        logger.log(f"saved {save_arrays('estimate.npz', **arrays)}")
    else:
        for name in TERMS:
            logger.log(f"saved {save_arrays(f'{name}_terms.npz', means[name].numpy())}")
    logger.log(f"saved {save_json('nll.json', found)}")
    try:
        logger.log(f"saved {save_plot('nll.png', draw_terms({'': means['vb'].numpy()}))}")
    except InputError as e:  # without matplotlib
        logger.log(f"no nll.png: {e}")


def create_argparser():
    return create_parser(LikelihoodScriptOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
