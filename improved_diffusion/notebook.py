"""
A run in a few lines of Python, as for a notebook:

    from improved_diffusion import load, picture, train

    train(images, "runs/a", labels=digits, max_steps=1000)    # a folder, a tensor, an array or a Dataset
    model, diffusion, config = load("runs/a")                 # the newest average
    samples = load("runs/a").sample(16, classes="3,7")        # [16, C, H, W]
    picture(samples)

Options have the names, limits and defaults of the scripts' flags; sizes and classes default to those of the images.
The folders are those of the scripts: a run that begins here continues there.
"""

import contextlib
import dataclasses
import io
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import blobfile as bf
import torch as th
from PIL import Image

from . import dist_util
from .cli.config_file import CONFIG, config_of, read_config
from .cli.dry_run import print_dry_run
from .cli.flag_names import answer_to_name
from .cli.interchange import options_of
from .cli.loop import train_run
from .cli.parser import named_as_in_python, with_defaults
from .cli.run_config import Run, of_weights, resumed
from .cli.run_folder import check_outside
from .data.images import to_image
from .data.memory import OwnImages
from .guidance import guided
from .image_datasets import load_data, load_dataset
from .inference.arrays import to_uint8
from .inference.generate import Finite, chosen_labels, draw, label_conditions, not_finite
from .inference.pictures import grid
from .inference.preview import create_preview
from .logger import Logger
from .metrics.sample_distance import create_sample_distance
from .metrics.validation import create_validation
from .option_groups import Option, check, coerce, rows
from .options import SampleOptions, SuperResSampleOptions, SuperResTrainOptions, TrainOptions
from .script_util import configure_compute, create_diffusion, create_model_and_diffusion, sr_create_model_and_diffusion
from .training.checkpoints import model_filename, newest_average, parse_name, rng_state, set_rng_state
from .training.stopping import StoppedBySignal
from .training.weights import is_young, load_weights, read_weights
from .utils.errors import InputError, MissingFileError
from .utils.files import user_path
from .utils.log_formats import KVWriter
from .utils.streams import show

_ONE_RUN = threading.Lock()


@contextlib.contextmanager
def _named_as_in_python():
    """Errors that name options without the dashes of flags. A decorator."""
    try:
        yield
    except InputError as e:
        e.args = (named_as_in_python(str(e)),)
        raise


# ---------------------------------------------------------------- train


@_named_as_in_python()
def train(data: Any, log_dir: str | os.PathLike, *, labels: Any = None, **options: Any) -> str:
    """
    Train a model as scripts/image_train.py does, on images from Python too. In IPython each preview is shown, and an
    interruption saves and returns; elsewhere it saves and raises KeyboardInterrupt.

    A run in log_dir is continued, unless overwrite=True. The caller's logger and random generators stay as they are;
    without a seed, torch's generator draws one.

    :param data: a folder of images, or what OwnImages takes: [N, C, S, S], uint8 or floats in [-1, 1], or a Dataset. Of
                 these, not of a folder, a new run takes image_size, image_channels and num_classes by default.
    :param labels: [N], integers: the model is class-conditional. For a folder the flag of this name.
    :param options: the flags of image_train.py, such as max_steps=1000, lr=2e-4, channel_mult="1,2".
    :return: log_dir.
    :raises InputError: for an invalid option, data or folder; names it.
    """
    if not isinstance(log_dir, (str, os.PathLike)) or not os.fspath(log_dir):
        raise InputError(f"log_dir {log_dir!r}: give the folder of the run")
    folder = _path(log_dir)
    in_python = not isinstance(data, (str, os.PathLike))
    if "data_dir" in options:
        raise InputError("data_dir: leave it out; the first argument of train() is the data")
    if in_python and "skip_damaged" in options:
        raise InputError(f"skip_damaged: is for images in files, but the data is {type(data).__name__}")
    if labels is not None and in_python:
        options.setdefault("class_cond", True)
    elif labels is not None:
        options["labels"] = labels
    given = _typed(rows(TrainOptions), {**options, "data_dir": "" if in_python else data, "log_dir": folder})
    given.setdefault("resume_checkpoint", "" if given.get("overwrite") else "auto")
    dist_util.setup_dist()
    drawn = int(th.randint(2**63 - 1, ())) if given.get("seed") is None else None
    with _alone(), _apart():
        flags = with_defaults(_defaults_of(data, labels, given) if in_python else TrainOptions(), given)
        check_outside(flags.options, folder)
        seed = flags.options.compute.seed
        dist_util.seed_everything(drawn if seed is None else seed)
        run = resumed(flags)
        batches = None
        if in_python:
            own = _own_data(data, labels, run, given)
            run = dataclasses.replace(run, notes=(*run.notes, *own.notes()))
            batches = run.options.call(load_dataset, dataset=own, data_dir="the data")
        if run.options.general.dry_run:
            print_dry_run(run, create_model_and_diffusion, batches, lambda line: show(named_as_in_python(line)))
        else:
            _train(run, batches or run.options.call(load_data, class_names=run.class_names))
    return folder


def _train(run, batches):
    options, names = run.options, batches.dataset.class_names
    model, diffusion = options.call(create_model_and_diffusion)
    configure_compute(model, use_bf16=options.compute.use_bf16, compile=options.compute.compile)
    measures = create_validation(options, diffusion, names), create_sample_distance(options, names)
    outputs = [InlinePictures()] if _in_ipython() else []
    preview = create_preview(options, names)
    train_run(
        run, create_model_and_diffusion, model, diffusion, batches, preview, measures,
        outputs=outputs, spell=named_as_in_python,
    )  # fmt: skip


def _defaults_of(data, labels, given):
    """The options of a new run on images from Python."""
    sizes = {name: given.get(name) for name in ("image_size", "image_channels", "num_classes")}
    named = labels is not None or getattr(data, "classes", None) is not None or "num_classes" in given
    own = OwnImages(data, labels, **sizes, class_cond=named and given.get("class_cond", False))
    classes = {"num_classes": len(own.class_names)} if own.class_names else {}
    return TrainOptions().replace(image_size=own.size, image_channels=own.channels, **classes)


def _own_data(data, labels, run, given):
    """Images from Python with the sizes and classes of a run."""
    model = run.options.model
    if labels is not None and not model.class_cond:
        raise InputError("labels: are given, but class_cond is False")
    sizes = {name: getattr(model, name) for name in ("image_size", "image_channels", "class_cond")}
    sizes |= dict(num_classes=given.get("num_classes"), class_names=run.class_names)
    own = OwnImages(data, labels, **sizes)
    if len(own.class_names or ()) > model.num_classes:
        raise InputError(f"num_classes {model.num_classes}: the data has {len(own.class_names)} classes")
    return own


def _typed(known: Iterable[Option], values: dict[str, Any]) -> dict[str, Any]:
    """
    Values of the options' types: paths, numbers and sequences for text too.

    :raises InputError: for an unknown name, or a value of another type.
    """
    by_name = {row.name: row for row in known}
    for name in values:
        if name not in by_name:
            raise InputError(f"{name}: no such option; {answer_to_name(name, by_name)}")
    typed = {name: coerce(row, _as_text(row, values[name])) for name, row in by_name.items() if name in values}
    for name, value in typed.items():
        check(by_name[name], value)
    return typed


def _as_text(row, value):
    if row.type is not str:
        return value
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
    if isinstance(value, (list, tuple, range)):
        return ",".join(map(str, value))
    if isinstance(value, os.PathLike) or (row.path and isinstance(value, str)):
        return _path(value)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _path(value):
    """:raises InputError: for a URL that cannot be opened."""
    return user_path(os.fspath(value))


def _known(options, *names):
    """The rows of some groups, and some single ones."""
    found = [row for row in rows(options) if row.group in names and row.name not in ("model_path", "seed")]
    return found + [row for row in rows(options) if row.name in names]


@contextlib.contextmanager
def _alone():
    """:raises InputError: within another run of the process: both would share the logger and the generators."""
    if not _ONE_RUN.acquire(blocking=False):
        raise InputError("another train() is running in this process; give each run a process of its own")
    try:
        yield
    finally:
        _ONE_RUN.release()


@contextlib.contextmanager
def _apart():
    """Keep the caller's logger and random generators out of a run, and end it by an interruption as Python does."""
    logger, rng, seed = Logger.CURRENT, rng_state(), dist_util._seed
    try:
        Logger.CURRENT = None
        yield
    except StoppedBySignal as e:
        if e.signal == "SIGINT" and not _in_ipython():
            raise KeyboardInterrupt from None
        if e.signal != "SIGINT":
            raise
    finally:
        of_run, Logger.CURRENT = Logger.CURRENT, logger
        Logger.EARLY.clear()  # of a run that did not begin
        set_rng_state(rng)
        dist_util._seed = seed
        if of_run not in (None, Logger.DEFAULT):
            of_run.close()


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

    @_named_as_in_python()
    def sample(self, num_samples: int | None = None, *, sampler: str | None = None, **options: Any) -> th.Tensor:
        """
        Draw samples as scripts/image_sample.py does.

        :param num_samples: default: one for each of `classes`, or their counts; without them 16.
        :param sampler: a key of SAMPLERS; default: dpm++2m-sde, or ancestral with timestep_respacing.
        :param options: its flags for sampling, and seed and timestep_respacing: sampling_steps=20, classes="3,7",
                        guidance_scale=2, batch_size=16, ...
        :return: float32 [num_samples, C, H, W], of the data's range [-1, 1], on the model's device.
        :raises InputError: for an invalid option, a model of super-resolution, or samples that are not finite.
        """
        base = options_of(self.config, "config")
        if isinstance(base, SuperResSampleOptions):
            raise InputError("the model enlarges images: call SAMPLERS with low_res, or scripts/super_res_sample.py")
        if sampler is None and not options.get("use_ddim"):
            respaced = options.get("timestep_respacing", base.diffusion.timestep_respacing)
            sampler = "ancestral" if respaced else "dpm++2m-sde"
        known = _known(SampleOptions, "sampling", "seed", "timestep_respacing")
        chosen = {"sampler": sampler, "num_samples": num_samples}
        given = _typed(known, {**options, **{name: value for name, value in chosen.items() if value is not None}})
        run = Run(with_defaults(base, given).options, self.config["class_names"])
        sampling, diffusion_options, labels = run.options.sampling, run.options.diffusion, None
        count = sampling.num_samples if num_samples is not None else 16
        if sampling.classes:
            wanted = None if num_samples is None else count
            labels = chosen_labels(sampling.classes, wanted, run.num_labels, run.class_names)
            count = len(labels)
        diffusion = create_diffusion(diffusion_options) if diffusion_options.timestep_respacing else self.diffusion
        model = Finite(guided(self.model, diffusion, sampling.guidance_scale, sampling.guidance_interval))
        settings = dict(
            shape=(run.options.model.image_channels, run.options.model.size, run.options.model.size),
            conditions=label_conditions(labels, run.num_labels),
            sampler=sampling.sampler_name,
            sampler_options=sampling.sampler_options,
            clip_denoised=sampling.clip_denoised,
            seed=run.options.compute.seed,
        )
        batches = (range(i, min(i + sampling.batch_size, count)) for i in range(0, count, sampling.batch_size))
        with th.no_grad():
            samples = th.cat([draw(diffusion, model, batch, **settings)[0] for batch in batches])
        if not (model.so_far and samples.isfinite().all()):
            raise not_finite("the model", any(p.dtype == th.float16 for p in self.model.parameters()))
        return samples


@_named_as_in_python()
def load(path: str | os.PathLike, **options: Any) -> Trained:
    """
    Load a trained model.

    :param path: the folder of a run, for its newest average, or the newest weights while that is young (is_young());
                 or a file of weights.
    :param options: flags that weights without config.json need: preset="imagenet64", or image_size and so on; and
                    use_bf16=True, timestep_respacing=..., for another precision or diffusion.
    :return: (model, diffusion, config).
    :raises InputError: if there are no weights, or they do not fit.
    """
    file: str = _path(path)
    if bf.isdir(file):
        config_and_path = read_config(file), bf.join(file, CONFIG)
        file = _newest_weights(file, (config_and_path[0] or {"flags": {}})["flags"])
    elif bf.exists(file):
        config_and_path = config_of(file)
    else:
        raise MissingFileError(f"{file}: is not there; give the folder of a run, or a file of weights")
    found, _ = config_and_path
    enlarges = "large_size" in (found["flags"] if found else options)
    defaults = SuperResSampleOptions() if enlarges else SampleOptions()
    known = _known(type(defaults), "model", "diffusion", "compute", "preset")
    flags = with_defaults(defaults, {**_typed(known, options), "model_path": file})
    weights = read_weights(file)
    run = of_weights(flags, weights, config_and_path)
    for note in run.notes:
        if note.startswith("WARNING"):
            show(named_as_in_python(note))
    model, diffusion = run.options.call(sr_create_model_and_diffusion if enlarges else create_model_and_diffusion)
    load_weights(model, weights, file)
    model.to(dist_util.dev()).eval()
    run.options.call(configure_compute, model=model)
    chosen = {**dataclasses.asdict(run.options.model), **dataclasses.asdict(run.options.diffusion)}
    script = (SuperResTrainOptions if enlarges else TrainOptions).script
    config = {"script": script, "class_names": run.class_names, "flags": {}, **(found or {})}
    return Trained(model, diffusion, {**config, "flags": {**config["flags"], **chosen}})


def _newest_weights(folder, flags):
    """The file that a preview of the newest checkpoint shows."""
    average = newest_average(folder, str(flags.get("ema_rate", "")))
    if average is None:
        raise InputError(f"{folder}: has no ema_ file; give the folder of a run, or a file of weights")
    _, step, rate, _ = parse_name(bf.basename(average))
    newest = bf.join(folder, model_filename(step))
    if is_young(rate, step, flags.get("ema_warmup") is True) and bf.exists(newest):
        show(f"{newest}: the average of step {step} still resembles the untrained model")
        return newest
    return average


def picture(samples: Any, labels: Any = None) -> Image.Image:
    """
    A grid of samples, which notebooks show.

    :param samples: [N, C, H, W] in [-1, 1], a tensor or an array.
    :param labels: [N], for a row per class.
    :raises InputError: for samples of another shape.
    """
    samples = th.as_tensor(samples)
    if samples.dim() != 4 or not len(samples) or samples.shape[1] not in (1, 3):
        raise InputError(f"samples: have shape {tuple(samples.shape)}; give [N, C, H, W] with 1 or 3 channels")
    rows_of = None if labels is None else th.as_tensor(labels).cpu().numpy()
    return to_image(grid(to_uint8(samples).cpu().numpy(), rows_of))
