"""
A run in a few lines of Python, as for a notebook:

    from improved_diffusion import load, picture, train

    train(images, "runs/a", labels=digits, max_steps=1000)    # a folder, a tensor, an array or a Dataset
    model, diffusion, config = load("runs/a")                 # the newest average
    samples = load("runs/a").sample(16, classes="3,7")        # [16, C, H, W]
    picture(samples)

Options have the names, defaults and limits of the scripts' flags, and the folders are those of the scripts: a run that
begins here continues there.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import sys
from typing import Any, NamedTuple

import blobfile as bf
import torch as th
from PIL import Image

from . import dist_util, logger
from .cli.config_file import config_of, read_config
from .cli.dry_run import print_dry_run
from .cli.estimate import memory_warnings
from .cli.interchange import options_of
from .cli.loop import create_loop
from .cli.parser import logging_to, with_defaults
from .cli.run_config import of_weights, resumed, save_config
from .cli.run_folder import check_outside, claim_folder
from .data.images import to_image
from .data.memory import OwnImages
from .guidance import guided
from .image_datasets import load_data, load_dataset
from .inference.arrays import to_uint8
from .inference.generate import chosen_labels, draw, label_conditions
from .inference.pictures import grid
from .inference.preview import create_preview
from .metrics.sample_distance import create_sample_distance
from .metrics.validation import create_validation
from .option_groups import Option, rows
from .options import SampleOptions, ScriptOptions, SuperResSampleOptions, TrainOptions
from .script_util import (
    configure_compute,
    create_diffusion,
    create_model_and_diffusion,
    sr_create_model_and_diffusion,
)
from .train_util import get_blob_logdir
from .training.checkpoints import newest_average
from .training.describe import log_start
from .training.resume import open_checkpoint
from .training.weights import load_weights, read_weights
from .utils.errors import InputError
from .utils.log_formats import KVWriter
from .utils.streams import show

# ---------------------------------------------------------------- train


def train(data: Any, log_dir: str | os.PathLike, *, labels: Any = None, **options: Any) -> str:
    """
    Train a model as scripts/image_train.py does, on images from Python too. In IPython each preview is shown; an
    interruption saves and returns.

    A run in log_dir is continued, unless overwrite=True.

    :param data: a folder of images, or what OwnImages takes: [N, C, S, S], uint8 or floats in [-1, 1], or a Dataset.
                 image_size, image_channels, class_cond and num_classes follow from the latter.
    :param labels: [N], integers: the model is class-conditional.
    :param options: the flags of image_train.py, such as max_steps=1000, lr=2e-4, channel_mult="1,2".
    :return: log_dir.
    :raises InputError: for an invalid option, data or folder; names it.
    """
    given = _typed(TrainOptions, {**options, "log_dir": log_dir})
    given.setdefault("resume_checkpoint", "" if given.get("overwrite") else "auto")
    dist_util.setup_dist()
    own = None
    if isinstance(data, (str, os.PathLike)):
        if labels is not None:
            raise InputError("labels: are those of file names or folders; give class_cond=True")
        given["data_dir"] = os.path.expanduser(data)
    else:
        own = OwnImages(
            data, labels, image_size=given.get("image_size"), image_channels=given.get("image_channels"),
            class_cond=given.get("class_cond", False),
        )  # fmt: skip
        given |= dict(image_size=own.size, image_channels=own.channels, class_cond=own.class_cond)
        if own.class_names:
            given.setdefault("num_classes", len(own.class_names))
    flags = with_defaults(TrainOptions(), given)
    classes, num_classes = len((own and own.class_names) or ()), flags.options.model.num_classes
    if classes > num_classes:
        raise InputError(f"num_classes {num_classes}: the data has {classes} classes")
    check_outside(flags.options, flags.options.general.log_dir)
    dist_util.seed_everything(flags.options.compute.seed)
    this_run = resumed(flags)
    run = this_run.options
    if run.general.dry_run:
        print_dry_run(this_run, create_model_and_diffusion)
        return run.general.log_dir

    model, diffusion = run.call(create_model_and_diffusion)
    configure_compute(model, use_bf16=run.compute.use_bf16, compile=run.compute.compile)
    batches = run.call(load_data, class_names=this_run.class_names) if own is None else _batches(own, this_run)
    names = batches.dataset.class_names
    measures = create_validation(run, diffusion, names), create_sample_distance(run, names)
    checkpoint = run.call(open_checkpoint, model=model)

    notes = [*this_run.notes, *memory_warnings(run, create_model_and_diffusion)]
    claim = claim_folder(checkpoint, run.general.overwrite)
    with _own_logger(), logging_to(run.general.log_dir, notes, claim), _interruptible():
        logger.get_current().output_formats += [InlinePictures()] if _in_ipython() else []
        loop = create_loop(run, model, diffusion, batches, checkpoint, create_preview(run, names), measures)
        save_config(get_blob_logdir(), "image_train", run, names)
        log_start(loop, batches.dataset)
        loop.draw_missing_preview()
        loop.run_loop()
    return run.general.log_dir


def _batches(own, this_run):
    names = own.class_names
    if this_run.class_names is not None and this_run.class_names != names:
        raise InputError(f"labels: are of the classes {names}; those of the run are {this_run.class_names}")
    return this_run.options.call(load_dataset, dataset=own, data_dir="the data")


def _typed(options: type[ScriptOptions], values: dict[str, Any]) -> dict[str, Any]:
    """
    Values of the options' types: 1 for a float, a path or a sequence for text.

    :raises InputError: for an unknown name, or a value of another type.
    """
    known = {row.name: row for row in rows(options)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            raise InputError(f"{name}: no such option{f'; did you mean {chr(32).join(near)}?' if near else ''}")
    return {name: _as_type(known[name], value) for name, value in values.items()}


def _as_type(row: Option, value):
    if value is None and row.default is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if row.type is str:
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if isinstance(value, (str, os.PathLike)) or number:
            return os.path.expanduser(value) if row.path or row.name == "log_dir" else str(value)
    elif type(value) is row.type or (row.valid is not None and value in row.valid.words):
        return value
    elif row.type is float and number:
        return float(value)
    raise InputError(f"{row.name} {value!r}: give a {row.type.__name__}")


@contextlib.contextmanager
def _own_logger():
    """Close the run's logger in the end, and restore the one before."""
    before = logger.Logger.CURRENT
    try:
        yield
    finally:
        if logger.Logger.CURRENT is not before:
            logger.get_current().close()
            logger.Logger.CURRENT = before


@contextlib.contextmanager
def _interruptible():
    """In IPython an interruption, which has saved, ends the cell, not the session."""
    try:
        yield
    except SystemExit as e:
        if e.code or not _in_ipython():
            raise


def _in_ipython():
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


class InlinePictures(KVWriter):
    """Pictures in a notebook: the newest one replaces the one before."""

    def __init__(self):
        self._handle = None

    def writekvs(self, kvs):
        pass

    def writeimage(self, key, pixels, step):
        from IPython.display import Image as Inline
        from IPython.display import display

        png = io.BytesIO()
        to_image(pixels).save(png, format="png")
        shown = Inline(png.getvalue(), alt=f"{key} of step {step}")
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)


# ---------------------------------------------------------------- load


class Trained(NamedTuple):
    """
    A trained model.

    :param model: the network in eval() mode, on this process's device.
    :param diffusion: of all timesteps, unless load() has others.
    :param config: the content of config.json.
    """

    model: Any
    diffusion: Any
    config: dict[str, Any]

    def sample(self, num_samples: int = 16, *, sampler: str = "dpm++2m-sde", **options: Any) -> th.Tensor:
        """
        Draw samples as scripts/image_sample.py does.

        :param sampler: a key of SAMPLERS.
        :param options: further flags of image_sample.py: sampling_steps=20, classes="3,7", guidance_scale=2, seed=0,
                        batch_size=16, ...; for ancestral and ddim timestep_respacing.
        :return: float32 [num_samples, C, H, W], of the data's range [-1, 1], on the model's device.
        :raises InputError: for an invalid option, or a model of super-resolution.
        """
        base = options_of(self.config, "config")
        if isinstance(base, SuperResSampleOptions):
            raise InputError("the model enlarges images: call SAMPLERS with low_res, or scripts/super_res_sample.py")
        given = _typed(SampleOptions, {**options, "sampler": sampler, "num_samples": num_samples})
        run = with_defaults(base, given).options
        sampling, names, labels = run.sampling, self.config["class_names"], None
        if sampling.classes:
            known = run.model.num_classes if run.model.class_cond else 0
            labels = chosen_labels(sampling.classes, num_samples, known, names)
        diffusion = create_diffusion(run.diffusion) if run.diffusion.timestep_respacing else self.diffusion
        model = guided(self.model, diffusion, sampling.guidance_scale, sampling.guidance_interval)
        num_classes = (len(names or ()) or run.model.num_classes) if run.model.class_cond else 0
        settings = dict(
            shape=(run.model.image_channels, run.model.size, run.model.size),
            conditions=label_conditions(labels, num_classes),
            sampler=sampling.sampler_name,
            sampler_options=sampling.sampler_options,
            clip_denoised=sampling.clip_denoised,
            seed=run.compute.seed,
        )
        numbers = range(num_samples)
        batches = (numbers[i : i + sampling.batch_size] for i in range(0, num_samples, sampling.batch_size))
        with th.no_grad():
            return th.cat([draw(diffusion, model, batch, **settings)[0] for batch in batches])


def load(path: str | os.PathLike, **options: Any) -> Trained:
    """
    Load a trained model.

    :param path: the folder of a run, for its newest average; or a file of weights.
    :param options: flags of image_sample.py, which weights without config.json need: preset="imagenet64", or image_size
                    and so on; use_bf16=True, ...
    :return: (model, diffusion, config).
    :raises InputError: if there are no weights, or they do not fit.
    """
    path = os.path.expanduser(path)
    if bf.isdir(path):
        config = read_config(path) or {"flags": {}}
        file = newest_average(path, str(config["flags"].get("ema_rate", "")))
        if file is None:
            raise InputError(f"{path}: has no ema_ file; give the folder of a run, or a file of weights")
        path = file
    weights = read_weights(path)
    found, _ = config_of(path)
    enlarges = "large_size" in (found["flags"] if found else options)
    defaults = SuperResSampleOptions() if enlarges else SampleOptions()
    run = of_weights(with_defaults(defaults, _typed(type(defaults), {**options, "model_path": path})), weights)
    for note in run.notes:
        if note.startswith("WARNING"):
            show(note)
    model, diffusion = run.options.call(sr_create_model_and_diffusion if enlarges else create_model_and_diffusion)
    load_weights(model, weights, path)
    model.to(dist_util.dev()).eval()
    run.options.call(configure_compute, model=model)
    flags = {**dataclasses.asdict(run.options.model), **dataclasses.asdict(run.options.diffusion)}
    config = {
        "script": "super_res_train" if enlarges else "image_train",
        "class_names": run.class_names,
        **(found or {}),
    }
    return Trained(model, diffusion, {**config, "flags": {**config.get("flags", {}), **flags}})


def picture(samples: th.Tensor, labels: Any = None) -> Image.Image:
    """
    A grid of samples, which notebooks show.

    :param samples: [N, C, H, W] in [-1, 1].
    :param labels: [N], for a row per class.
    """
    return to_image(
        grid(to_uint8(samples).cpu().numpy(), None if labels is None else th.as_tensor(labels).cpu().numpy())
    )
