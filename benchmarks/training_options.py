"""Sub-command training: what options of training change, at equal steps and seeds. Resumable, run by run."""

import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from features import Classifier
from tables import publish
from timing import spread

from improved_diffusion import load, train
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import Arrays, Source, digits, emoji
from improved_diffusion.image_datasets import load_data_once, open_images
from improved_diffusion.inference.arrays import to_uint8
from improved_diffusion.metrics import FeatureNetwork, features_of, frechet_distance, precision_recall
from improved_diffusion.metrics.image_sets import evenly
from improved_diffusion.metrics.likelihood import evaluate_bpd, summarize
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.files import write_files
from improved_diffusion.utils.streams import show

sys.path.append(str(Path(__file__).parent.parent))  # the root, for a package that is not installed

from reproduce import jobs

BASELINE = dict(
    class_cond=True, learn_sigma=True, noise_schedule="cosine", attention_resolutions="4", ema_rate="0.99",
    log_interval=100, preview_samples=0, keep_checkpoints=1, num_workers=0,
)  # fmt: skip
OF_DATA = dict(
    digits=dict(image_size=8, image_channels=1, num_classes=10, channel_mult="1,2", lr=2e-3),
    emoji=dict(image_size=16, image_channels=3, num_classes=2, channel_mult="1,2,2", lr=1e-3),
)
SCALES = (1, 1.5, 2, 4)  # of guidance, for the run with class_dropout
SEED = 0  # of samples and likelihoods
ESTIMATE = 20  # evaluations an image for its NLL
REFERENCE = 2000  # training images that samples are compared with, at most
WORKERS = 2  # processes of one thread: two runs at once are faster than one on two threads


def training(args):
    """Each run, with what was measured of it, is in a folder of OUT/training, which a later call continues or reads."""
    if args.num_samples < 4:
        raise InputError(f"--num_samples {args.num_samples}: give 4 or more, as precision is by third neighbours")
    if not args.quick:
        FeatureNetwork("lite0")  # an error now if it is not installed
    for data, source in SOURCES.items():
        if not os.path.exists(os.path.join(packed(args, data), "test")):
            write(source(), packed(args, data))
    runs = runs_of(args)
    missing, start = [run for run in runs if not os.path.exists(run.result)], time.monotonic()
    with pool() as workers:
        for done, run in enumerate(workers.map(functools.partial(execute, args), missing), start=1):
            left = (time.monotonic() - start) / done * (len(missing) - done) / 60
            show(f"{time.strftime('%H:%M')}  {run.data}, {run.option}, seed {run.flags['seed']}; {left:.0f} min left")
    for data in SOURCES:
        results = [json.loads(Path(run.result).read_text()) for run in runs if run.data == data]
        publish(f"training-{data}", rows_of(results), args, [note(args, results[0])])


def packed(args, data):
    """Folder of the images."""
    return os.path.join(args.out, "training", f"{data}.packed")


def pool() -> Executor:
    return ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), initialize)


def initialize() -> None:
    """Initialize a worker as reproduce/ does, without output on the terminal."""
    jobs.initialize()
    os.environ["OPENAI_LOG_FORMAT"] = "log,csv"


class Run(NamedTuple):
    data: str
    option: str  # what differs from the baseline
    flags: dict  # of image_train.py, without paths
    folder: str  # another for other flags
    result: str  # file of what was measured; another for other counts


def runs_of(args) -> list[Run]:
    """All, a seed after the other; data sets alternate, for the estimate of the time left."""
    steps = args.train_steps
    options = (
        {}, dict(grad_clip=1.0), dict(lr_warmup_steps=max(1, steps // 10)), dict(ema_warmup=True),
        dict(predict_v=True), dict(loss_weighting="min_snr"), dict(class_dropout=0.1),
    )  # fmt: skip
    common = dict(
        num_channels=args.num_channels, num_res_blocks=args.num_res_blocks, batch_size=args.batch_sizes[0],
        lr_anneal_steps=steps, save_interval=steps, diffusion_steps=50 if args.quick else 1000,
    )  # fmt: skip
    measured = f"measured-{digest([args.num_samples, args.sample_steps, args.num_images, args.quick])}.json"
    runs = []
    for seed in range(args.repetitions):
        for option in options:
            for data in SOURCES:
                flags = {**BASELINE, **common, **OF_DATA[data], **option, "seed": seed}
                name = " ".join(f"{key} {value}" for key, value in option.items()) or "baseline"
                folder = os.path.join(args.out, "training", f"{data}-{name.replace(' ', '-')}-{digest(flags)}")
                runs.append(Run(data, name, flags, folder, os.path.join(folder, measured)))
    return runs


def digest(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def digits8() -> dict[str, Source]:
    """The demo's digits at half the size; every tenth is held out."""
    whole = digits()
    images = whole.images.reshape(-1, 8, 2, 8, 2, 1).mean((2, 4)).round().astype(np.uint8)
    held_out = np.arange(len(images)) % 10 == 0
    parts = {"train": ~held_out, "test": held_out}
    return {part: Arrays(images[chosen], whole.labels[chosen], whole.classes) for part, chosen in parts.items()}


def emoji16() -> dict[str, Source]:
    """Emoji of two vendors, 16x16; a fourth of the held-out ones."""
    parts = emoji(image_size=16)
    test = parts["test"]
    few = Arrays(np.stack([test[i] for i in range(0, len(test), 4)]), test.labels[::4], test.classes)
    return {"train": parts["train"], "test": few}


SOURCES = dict(digits=digits8, emoji=emoji16)


def execute(args, run: Run) -> Run:
    """Train, measure, and keep what was found."""
    data, guides = packed(args, run.data), "class_dropout" in run.flags
    sizes = {name: run.flags[name] for name in ("image_size", "image_channels", "class_cond")}
    train(os.path.join(data, "train"), run.folder, **run.flags)
    trained, judge = load(run.folder), judge_of(os.path.join(data, "train"), *sizes.values(), args.quick)
    test = load_data_once(data_dir=os.path.join(data, "test"), batch_size=100, limit=args.num_images, **sizes)
    nll = summarize(*evaluate_bpd(trained.model, trained.diffusion, test, seed=SEED, estimate=ESTIMATE))["bpd"]
    labels, rows = judge.labels[evenly(args.num_samples, len(judge.labels))], {}
    how = dict(classes=labels.tolist(), sampling_steps=args.sample_steps, seed=SEED, batch_size=100)
    for scale in SCALES if guides else SCALES[:1]:
        samples = to_uint8(trained.sample(len(labels), guidance_scale=scale, **how)).cpu().numpy()
        name = run.option + f", guidance_scale {scale}" * guides
        rows[name] = judge(samples, labels) | {"NLL": nll if scale == 1 else None}
    held_out = judge.agreement(np.array(test.dataset.local_images), test.dataset.local_classes)
    text = json.dumps({"rows": rows, "read": held_out, "images": len(test.dataset)}).encode()
    write_files(run.folder, {os.path.basename(run.result): lambda f: f.write(text)})
    return run


class Judge:
    """What samples are compared with: the training images, their features, and a classifier fitted to them."""

    def __init__(self, path, image_size, image_channels, class_cond, quick):
        dataset = open_images(path, image_size, class_cond, image_channels)
        images, labels = np.array(dataset.local_images), dataset.local_classes
        self.labels = np.sort(labels)
        self.classifier = Classifier(images, labels, steps=10 if quick else 300)
        self.features = {"classifier": self.classifier.features}
        if not quick:
            self.features["lite0"] = functools.partial(features_of, network=FeatureNetwork("lite0"), batch_size=5)
        chosen = images[evenly(REFERENCE, len(images))]
        self.known = {name: function(chosen) for name, function in self.features.items()}

    def __call__(self, images, labels):
        """A row: precision and recall are by the last of the features, beside equally many images."""
        found = {name: function(images) for name, function in self.features.items()}
        row = {f"FD, {name}": frechet_distance(found[name], self.known[name]) for name in found}
        few, known = list(found.values())[-1], list(self.known.values())[-1]
        precision, recall = precision_recall(few, known[evenly(len(few), len(known))])
        return row | {"as asked": self.agreement(images, labels), "precision": precision, "recall": recall}

    def agreement(self, images, labels):
        return float(np.mean(self.classifier.predict(images) == labels))


judge_of = functools.cache(Judge)  # in a worker


def rows_of(results: list[dict]) -> list[dict]:
    """:param results: of all runs on a data set. :return: a row for each label, with the spread over the seeds."""
    rows = []
    for label in dict.fromkeys(label for result in results for label in result["rows"]):
        found = [result["rows"][label] for result in results if label in result["rows"]]
        columns = {name: [row[name] for row in found] for name in found[0]}
        rows.append({"training": label} | {k: None if None in v else spread(v) for k, v in columns.items()})
    return rows


def note(args, result):
    return (
        f"{args.train_steps} steps of {args.batch_sizes[0]} images, {args.repetitions} seeds. {args.num_samples} "
        f"samples of dpm++2m-sde in {args.sample_steps} evaluations. NLL: bits/dim of {result['images']} held-out "
        f"images, by {ESTIMATE} evaluations each. As asked: the share that a classifier reads as their class; of "
        f"held-out images {result['read']:.1%}. {WORKERS} processes of one thread each."
    )
