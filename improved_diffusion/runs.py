"""What the scripts share between their flags and their work: the log, the model, training."""

import contextlib
import datetime
import itertools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import blobfile as bf
import numpy as np
import torch as th

from . import dist_util, logger
from .cli.dry_run import print_dry_run
from .cli.run_config import read_config, save_config, settle_flags, take_flags
from .inference.generate import chosen_labels, for_inference, generate, refuse_old_images, write_samples
from .inference.preview import STEPS, Preview
from .inference.weights import fit_weights, load_weights, read_weights
from .resample import create_named_schedule_sampler
from .script_util import args_to_dict, compute_defaults, configure_compute, create_diffusion, train_loop_defaults
from .train_util import TrainLoop, get_blob_logdir
from .training.checkpoints import is_of_a_run
from .utils.errors import InputError
from .utils.files import FolderLock, is_remote

# flags that say nothing about the run itself
_OF_THE_CALL = {"given", "log_dir", "preset", "dry_run"}


# ---------------------------------------------------------------- flags


def data_defaults():
    """Flags of where images come from."""
    return dict(data_dir="", num_workers=-1, pin_memory=True)


def training_defaults():
    """Flags of the training scripts, but for the model's and the diffusion's."""
    return dict(
        random_flip=False,
        schedule_sampler="uniform",
        preview_samples=16,
        **{**data_defaults(), **train_loop_defaults(), **compute_defaults()},
    )


def sampling_defaults():
    """Flags of the scripts that draw samples, but for the model's and the diffusion's."""
    return dict(
        model_path="",
        num_samples=10000,
        batch_size=16,
        use_ddim=False,
        clip_denoised=True,
        save_images=False,
        **compute_defaults(),
    )


def data_flags(args):
    """What load_data(), load_superres_data() and load_data_once() take of a script's flags, but for sizes."""
    keys = [*data_defaults(), "batch_size", "class_cond", "image_channels", "num_classes"]
    return args_to_dict(args, [*keys, "random_flip"] if hasattr(args, "random_flip") else keys)


# ---------------------------------------------------------------- before all else


@contextlib.contextmanager
def logging_to(args, notes=()):
    """
    For the length of a with block, a log in --log_dir, OPENAI_LOGDIR, or else a new folder runs/SCRIPT-DATE-TIME.

    :param notes: lines for its beginning.
    """
    named = _named_directory(args)
    common = dist_util.from_rank_0(lambda: named or _new_directory())  # of the ranks that none is named to
    logger.configure(named or common)
    logger.log(dist_util.describe())
    for note in notes:
        logger.log(note)
    try:
        yield
    finally:
        elsewhere = hasattr(args, "save_interval") and os.environ.get("DIFFUSION_BLOB_LOGDIR")
        logger.log(f"all files are in {logger.get_dir()}{f', checkpoints in {elsewhere}' if elsewhere else ''}")


def _named_directory(args):
    """:raises InputError: if it is a URL."""
    directory = os.path.expanduser(args.log_dir or os.environ.get("OPENAI_LOGDIR", ""))
    if is_remote(directory):
        raise InputError(
            f"log_dir {directory}: name a local folder; checkpoints go to a URL that DIFFUSION_BLOB_LOGDIR names"
        )
    return directory


def _new_directory():
    name = os.path.join("runs", f"{_script()}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}")
    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):  # others may begin in the same second
        try:
            os.makedirs(name + suffix)
            return name + suffix
        except FileExistsError:
            pass
        except OSError as e:
            raise InputError(f"{name}: cannot be made a folder ({e.strerror}); give --log_dir") from None


def _script():
    return os.path.splitext(os.path.basename(sys.argv[0]))[0]


def begin(args):
    """
    What comes before all else: the ranks meet, and the random generators get their seed.

    :raises InputError: if the log directory cannot be one.
    """
    _named_directory(args)
    dist_util.setup_dist()
    dist_util.seed_everything(args.seed)


# ---------------------------------------------------------------- training


class Begun(NamedTuple):
    model: th.nn.Module
    diffusion: object
    class_names: list | None  # of the run that is continued: its classes keep their numbers
    notes: list[str]  # lines for the log


def create_for_training(args, create, model_flags):
    """
    The network and the diffusion that flags describe; none of it for --dry_run True, which ends here. Where a run is
    continued, or its weights are, model flags that are not given become those of that run.

    :param args: of parse_flags().
    :return: a Begun.
    :raises SystemExit: (with status 0) after a dry run.
    :raises InputError: if a flag cannot work, or the weights to continue from do not fit.
    """
    directory = _resumed_directory(args)
    config = dist_util.from_rank_0(read_config, directory) if directory is not None else None
    notes = take_flags(args, model_flags, config, directory) if config else []
    if args.dry_run:
        print_dry_run(args, create, model_flags, notes)
        raise SystemExit(0)
    model, diffusion = create(**args_to_dict(args, model_flags))
    if args.resume_checkpoint not in ("", "auto"):  # the second can be looked for when there is a log
        load_weights(model, args.resume_checkpoint, flag="resume_checkpoint")
    configure_compute(model, use_bf16=args.use_bf16, compile=args.compile)
    goes_on = args.resume_checkpoint == "auto" or is_of_a_run(args.resume_checkpoint)  # not from an average
    names = config["class_names"] if config and goes_on and args.class_cond else None
    return Begun(model.to(dist_util.dev()), diffusion, names, notes)


def _resumed_directory(args):
    """Where the config.json of the run that is continued is, if one is."""
    if args.resume_checkpoint == "auto":
        return os.environ.get("DIFFUSION_BLOB_LOGDIR") or _named_directory(args)
    return bf.dirname(args.resume_checkpoint) if args.resume_checkpoint else None


def train(args, begun, data):
    """
    Train as flags say, with everything that a run leaves in its folder.

    :param begun: of create_for_training().
    :param data: of load_data().
    :raises InputError: if another run has the folder for checkpoints, whose files both would overwrite.
    """
    model, diffusion, _, notes = begun
    directory = os.environ.get("DIFFUSION_BLOB_LOGDIR") or _named_directory(args)
    # before the first line of the log, unless the folder is new
    with _alone_in(directory), logging_to(args, notes), _alone_in("" if directory else get_blob_logdir()):
        flags = {name: value for name, value in vars(args).items() if name not in _OF_THE_CALL}
        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=data,
            schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
            flags=flags,
            preview=_preview(args, data) if args.preview_samples and dist_util.rank() == 0 else None,
            **args_to_dict(args, train_loop_defaults()),
        )
        names = data.dataset.class_names
        dist_util.from_rank_0(save_config, get_blob_logdir(), _script(), flags, names)
        _log_beginning(args, model, data.dataset, loop)
        loop.draw_missing_preview()
        loop.run_loop()


@contextlib.contextmanager
def _alone_in(directory):
    """A FolderLock of rank 0's for the length of a with block; none for "", a folder that is not known yet."""
    lock = FolderLock(directory)
    if directory:
        dist_util.from_rank_0(lock.acquire)
    try:
        yield
    finally:
        lock.release()


def _log_beginning(args, model, dataset, loop):
    names = dataset.class_names
    if names is not None:
        logger.log(f"classes: {describe_classes(names)}")
    ranks = dist_util.world_size()
    ends = [steps for steps in (args.lr_anneal_steps, args.max_steps) if steps]
    if ends and loop.step + loop.resume_step >= min(ends):
        logger.log(f"the run is at step {loop.step + loop.resume_step} already: nothing is left to train")
    logger.log(
        f"{dataset.num_images:,} images{f' of {len(names)} classes' if names else ''}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {ranks} rank{'s' * (ranks > 1)} of "
        f"{args.batch_size} images a step; training {f'to step {min(ends)}' if ends else 'until it is stopped'}; "
        f"next checkpoint: step {loop.next_save()}, then every {args.save_interval}"
    )


def describe_classes(names, only=None):
    """
    The classes with their numbers, in a line: 0 cat, 1 dog.

    :param only: the numbers of those to name.
    """
    shown = [f"{i} {name}" for i, name in enumerate(names) if only is None or i in only]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", shown[-1]])


def _preview(args, data):
    steps = str(min(STEPS, args.diffusion_steps))
    size = getattr(args, "image_size", None) or args.large_size
    count, conditions = args.preview_samples, {}
    if hasattr(args, "small_size"):
        _, conditions = data.first(count)
        count = len(conditions["low_res"])
    elif args.class_cond:
        conditions = {"y": th.arange(count) % len(data.dataset.class_names)}
    diffusion = create_diffusion({**vars(args), "timestep_respacing": steps})
    return Preview(diffusion, (args.image_channels, size, size), count, conditions)


# ---------------------------------------------------------------- trained models


class Trained(NamedTuple):
    model: Callable  # ready for use
    diffusion: object
    class_names: list | None  # of the run that it comes from
    labels: np.ndarray | None  # those that --classes asks for
    notes: list[str]  # lines for the log


def create_trained(args, create, model_flags):
    """
    A trained network and its diffusion. Flags that are not given become those of its run.

    :param args: of parse_flags(), with model_path.
    :param create: a factory of (model, diffusion).
    :param model_flags: the names of the flags that it takes.
    :return: a Trained.
    :raises SystemExit: (with status 0) after a dry run.
    :raises InputError: if a flag cannot work, or the weights do not fit.
    """
    weights = read_weights(args.model_path)
    class_names, notes = settle_flags(args, model_flags, weights)
    if args.dry_run:
        print_dry_run(args, create, model_flags, notes)
        raise SystemExit(0)
    model, diffusion = create(**args_to_dict(args, model_flags))
    fit_weights(model, weights, args.model_path)
    labels = None
    if getattr(args, "classes", ""):
        labels = _chosen_labels(args, class_names)
        named = describe_classes(class_names or range(args.num_classes), only=set(labels.tolist()))
        notes.append(f"of the classes, these are drawn: {named}")
    model = for_inference(model, batch_size=args.batch_size, **args_to_dict(args, compute_defaults()))
    if args.class_cond and class_names:
        notes.append(f"classes: {describe_classes(class_names)}")
    return Trained(model, diffusion, class_names, labels, notes)


def _chosen_labels(args, class_names):
    if not args.class_cond:
        raise InputError(f"classes {args.classes}: the model is not class-conditional")
    num_samples = args.num_samples if "num_samples" in args.given or ":" not in args.classes else None
    labels = chosen_labels(args.classes, num_samples, args.num_classes, class_names)
    args.num_samples = len(labels)
    return labels


def sample(args, trained, size, conditions, said):
    """
    Draw samples as flags say, and write them.

    :param trained: of create_trained().
    :param size: height and width of a sample.
    :param conditions: as of sample_util.generate().
    :param said: a line for the log before it begins.
    """
    with logging_to(args, trained.notes):
        logger.log(said)
        if args.save_images:
            dist_util.from_rank_0(refuse_old_images)
        images, labels = generate(
            trained.diffusion,
            trained.model,
            shape=(args.image_channels, size, size),
            num_samples=args.num_samples,
            batch_size=args.batch_size,
            conditions=conditions,
            use_ddim=args.use_ddim,
            clip_denoised=args.clip_denoised,
            seed=args.seed,
        )
        if dist_util.rank() == 0:
            write_samples(images, labels, trained.class_names, args.save_images)
