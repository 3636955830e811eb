"""
A published checkpoint on a GPU: what is measured beside what is published, by steps.

    python -m reproduce.released imagenet64 --model_path imagenet64_uncond_100M_1500K.pt \
        --data_dir val64.packed --reference train64.packed --steps 25,50,100

NLL is of held-out images (--data_dir) over chains of even steps; FID is of samples and a reference, as of
image_eval.py. Each number is printed and kept in --out as it is found; the same command continues. `own` is any
unconditional model of image_train.py.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

from improved_diffusion import dist_util, logger
from improved_diffusion.cli.config_file import read_config
from improved_diffusion.cli.parser import FlagParser, run
from improved_diffusion.cli.presets import PRESETS
from improved_diffusion.image_datasets import open_images
from improved_diffusion.metrics import FeatureNetwork, features_of, frechet_distance
from improved_diffusion.metrics.evaluation import statistics_of
from improved_diffusion.metrics.image_sets import ImageSet, evenly
from improved_diffusion.option_groups import rows
from improved_diffusion.options import TrainOptions
from improved_diffusion.script_util import whole_number
from improved_diffusion.utils.errors import InputError, first_line
from improved_diffusion.utils.files import write_files
from improved_diffusion.utils.streams import show

from . import measures
from .page import markdown

STEPS = (25, 50, 100, 200, 400, 1000, 4000)
# {model: {quantity: {steps: value}}}. Several steps: Bao et al. 2022, arXiv 2201.06503; one: docs/published_models.md
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "imagenet64": {
        "NLL": dict(zip(STEPS, (18.91, 8.46, 5.27, 4.24, 3.86, 3.68, 3.57), strict=True)),
        "FID learned": {4000: 19.2},
        "FID DDIM": dict(zip(STEPS, (26.06, 20.10, 18.09, 17.84, 17.74, 17.73, 19.00), strict=True)),
        "FID fixed small": dict(zip(STEPS, (29.21, 21.71, 19.12, 17.81, 17.48, 16.84, 16.55), strict=True)),
    },
    "imagenet64_vlb": {"NLL": {4000: 3.53}, "FID learned": {4000: 40.1}},
    "cifar10": {"NLL": {4000: 3.17}, "FID learned": {4000: 3.19}},
    "cifar10_vlb": {"NLL": {4000: 2.94}, "FID learned": {4000: 11.47}},
    "lsun_bedroom": {"FID learned": {1000: 4.24}},
    "own": {},
}
SAMPLING = {"FID learned": {}, "FID DDIM": dict(sampler="ddim"), "FID fixed small": dict(fixed="small")}
# what the numbers depend on
SETTINGS = {"NLL": ("data_dir", "images"), **dict.fromkeys(SAMPLING, ("reference", "samples", "features"))}


def main():
    args = create_argparser().parse_args()
    logger.Logger.CURRENT = logger.Logger(dir=None, output_formats=[])  # one line for each number is enough
    dist_util.setup_dist()
    trained = measures.Trained(options_of(args), args.model_path, args.batch_size)
    if not (args.data_dir or args.reference):
        raise InputError("nothing to measure: give data_dir for the NLL, reference for the FID, or both")
    wanted = [(name, steps) for name in ("NLL", *SAMPLING) for steps in args.steps if can(name, steps, trained, args)]
    find = Finder(trained, args)
    show(table(args.model, {f"{name} {steps}": find(name, steps) for name, steps in wanted}, args.steps))


def options_of(args) -> TrainOptions:
    """The flags of the model: the preset's, or those of its run."""
    if args.model == "own":
        config = read_config(os.path.dirname(args.model_path))
        if config is None:
            raise InputError(f"{args.model_path}: has no config.json beside it; name a published model instead of own")
        flags = config["flags"]
    else:
        flags = PRESETS[args.model]
    if flags.get("class_cond"):
        other = "image_nll.py, and image_eval.py of samples of image_sample.py, measure class-conditional ones"
        raise InputError(f"{args.model_path}: give an unconditional model; {other}")
    known = {row.name for row in rows(TrainOptions)}
    return TrainOptions().replace(**{name: value for name, value in flags.items() if name in known})


def can(name: str, steps: int, trained: measures.Trained, args) -> bool:
    """Whether the data is given, and the chain has these steps; DDIM needs an equal stride."""
    whole = trained.options.diffusion.diffusion_steps
    given = args.data_dir if name == "NLL" else args.reference
    return bool(given) and steps <= whole and (name != "FID DDIM" or whole % steps == 0)


class Finder:
    """
    Measures, and keeps what it finds in a file: {"NLL 25": {"value": 4.2, "settings": {...}}, ...}.

    :raises InputError: if the file is another's, or a number in it is of another model, other data or counts.
    """

    def __init__(self, trained: measures.Trained, args):
        self.trained, self.args = trained, args
        self.path, self.kept = Path(args.out or f"released-{args.model}.json"), {}
        if self.path.exists():
            try:
                kept = json.loads(self.path.read_text(encoding="utf-8"))
                self.kept = {k: {"value": float(v["value"]), "settings": dict(v["settings"])} for k, v in kept.items()}
            except Exception as e:  # JSON of another form raises anything
                raise InputError(f"out {self.path}: not numbers of this program ({first_line(e)})") from None
        self._reference = self._network = None

    def __call__(self, name: str, steps: int) -> float:
        label = f"{name} {steps}"
        settings = {setting: getattr(self.args, setting) for setting in ("model", "model_path", *SETTINGS[name])}
        if label in self.kept:
            if self.kept[label]["settings"] != settings:
                raise InputError(f"out {self.path}: has {label} of {self.kept[label]['settings']}; give another file")
            return self.kept[label]["value"]
        value = self.nll(steps) if name == "NLL" else self.fid(steps, **SAMPLING[name])
        if not math.isfinite(value):
            raise InputError(f"{self.args.model_path}: {name} in {steps} steps is {value}")
        self.kept[label] = {"value": value, "settings": settings}
        text = json.dumps(self.kept, indent=1).encode()
        write_files(str(self.path.absolute().parent), {self.path.name: lambda f: f.write(text)})
        show(f"{name} in {steps} steps: {value:.4g}")
        return value

    def nll(self, steps: int) -> float:
        model = self.trained.options.model
        dataset = open_images(self.args.data_dir, model.image_size, False, model.image_channels)
        images = np.stack([dataset.pixels(i) for i in evenly(self.args.images, len(dataset))])
        diffusion = self.trained.diffusion(timestep_respacing=str(steps))
        return measures.bound(self.trained, diffusion, images)["bpd"]

    def fid(self, steps: int, sampler: str = "ancestral", fixed: str = "") -> float:
        if self._network is None:
            size, channels = self.trained.options.model.image_size, self.trained.options.model.image_channels
            self._network = FeatureNetwork(self.args.features)
            reference = ImageSet(self.args.reference)
            reference.scale_to((size, size, channels))
            self._reference = statistics_of(reference, self._network).moments["features"]
        images = measures.draw(self.trained, self.args.samples, sampler, steps, fixed)
        return frechet_distance(features_of(images, self._network), self._reference)


def table(model: str, found: dict[str, float], steps: list[int]) -> str:
    """A line of measured and one of published numbers for each quantity."""
    lines = []
    for name in ("NLL", *SAMPLING):
        published = PUBLISHED[model].get(name, {})
        measured = {k: found[f"{name} {k}"] for k in steps if f"{name} {k}" in found}
        for label, values in (("measured", measured), ("published", published)):
            if values:
                lines.append([name, label, *(f"{values[k]:.2f}" if k in values else "" for k in steps)])
    return markdown(["", "", *map(str, steps)], lines)


def create_argparser() -> argparse.ArgumentParser:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(PUBLISHED), help="a published model, or own for one of a run")
    parser.add_argument("--model_path", required=True, help="the weights")
    parser.add_argument("--data_dir", default="", help="held-out images, for the NLL")
    parser.add_argument("--reference", default="", help="images or statistics, for the FID")
    parser.add_argument("--steps", default=list(STEPS), type=numbers, help="separated by commas")
    parser.add_argument("--images", default=1000, type=count, help="held-out images")
    parser.add_argument("--samples", default=10_000, type=count, help="for each FID")
    parser.add_argument("--features", default="inception", help="as of image_eval.py; only inception's distance is FID")
    parser.add_argument("--batch_size", default=100, type=count, help="images at once")
    parser.add_argument("--out", default="", help="JSON file of the numbers (default: released-MODEL.json)")
    return parser


def numbers(text: str) -> list[int]:
    return [count(word) for word in text.split(",")]


def count(text: str) -> int:
    """:raises argparse.ArgumentTypeError: if text is not a number above 0."""
    if whole_number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return whole_number(text)


if __name__ == "__main__":
    run(main)
