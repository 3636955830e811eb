"""
Compare samples with a reference: Fréchet distance, kernel distance, precision and recall of the features of a network.

Each is an npz file of image_sample.py, packed images, a folder of images, or a file of statistics (--save_stats,
OpenAI's reference batches). The results go to the log and to metrics.json; docs/metrics.md tells how to read them.

    python scripts/image_eval.py --samples runs/a/samples_10000x64x64x3.npz --reference photos64.packed
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.parser import create_parser, logging_to, parse_flags, run
from improved_diffusion.inference.arrays import save_json
from improved_diffusion.metrics import evaluation
from improved_diffusion.metrics.features import FeatureNetwork
from improved_diffusion.metrics.image_sets import open_pair
from improved_diffusion.options import EvalOptions


def main():
    options = parse_flags(create_argparser(), EvalOptions()).options
    dist_util.setup_dist()
    chosen = options.evaluation
    if chosen.save_stats:
        evaluation.check_new_file(chosen.save_stats)
    pair = options.call(open_pair)
    for images in pair:
        evaluation.check_statistics(images, chosen.features)
    network = FeatureNetwork(chosen.features, chosen.feature_weights)

    with logging_to(options.general.log_dir):
        samples, reference = (evaluation.statistics_of(images, network) for images in pair)
        if dist_util.rank() == 0:
            if chosen.save_stats:
                evaluation.save_statistics(chosen.save_stats, reference)
                logger.log(f"saved {chosen.save_stats}")
            report(samples, reference, chosen)


def report(samples, reference, chosen):
    """Log a table, and write metrics.json."""
    found = evaluation.compare(samples, reference)
    table = {
        "samples": f"{count(samples)} images, {chosen.samples}",
        "reference": f"{count(reference)} images, {chosen.reference}",
        **{name: f"{value:.5g}" for name, value in found.items()},
    }
    for line in evaluation.warnings_of(samples, reference):
        logger.warn(line)
    for name, text in table.items():
        logger.log(f"{name:<{max(map(len, table))}}  {text}")
    sets = {"samples": chosen.samples, "reference": chosen.reference, "features": chosen.features}
    counts = {"samples_count": samples.count, "reference_count": reference.count}
    logger.log(f"saved {save_json('metrics.json', {**sets, **counts, **found})}")


def count(statistics):
    return "an unknown number of" if statistics.count is None else f"{statistics.count:,}"


def create_argparser():
    return create_parser(EvalOptions(), __doc__)


def cli():
    run(main)


if __name__ == "__main__":
    cli()
