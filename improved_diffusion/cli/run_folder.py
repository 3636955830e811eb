"""The folder of a training run: outside the images, and of one run alone."""

import functools
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

from .. import dist_util, train_util
from ..logger import Logger
from ..options import TrainOptions
from ..training.checkpoints import has_checkpoint, newest_step, parse_name
from ..training.resume import Checkpoint
from ..utils.errors import InputError, first_line
from ..utils.files import FolderLock, checkpoint_url, is_inside, is_remote

EARLIER = "earlier-{}"  # subfolder for the files of an earlier run
LOGS = re.compile(
    r"(log|progress)(-rank\d+)?\.(txt|csv|json)(\.damaged)?|tb(-rank\d+)?|wandb(-id(-rank\d+)?\.txt)?"
    r"|config\.json|progress\.png"
)


def check_outside(options: TrainOptions, log_dir: str) -> None:
    """
    :param log_dir: given by flag or environment; "" for a new folder in runs.
    :raises InputError: if the run would write pictures into its data_dir.
    """
    data_dir, given = options.data.data_dir, options.general.log_dir
    named = "log_dir" if given or not log_dir else "OPENAI_LOGDIR"
    for name, folder in ((named, log_dir or "runs"), ("DIFFUSION_BLOB_LOGDIR", checkpoint_url())):
        if folder and data_dir and is_inside(folder, data_dir):
            problem = f"is inside data_dir {data_dir}, and the run would train on its own previews"
            raise InputError(f"{name} {folder}: {problem}; give a folder outside")


def check_unused(options: Any, log_dir: str) -> None:
    """
    Refuse the folder of another run, before long work. A collective.

    :param options: TrainOptions.
    :param log_dir: as in check_outside().
    :raises InputError: unless the run continues the other, or options.general.overwrite.
    """
    resume_from = options.training.resume_checkpoint
    if not options.general.overwrite and (log_dir or checkpoint_url()):
        checkpoint = resume_from if resume_from in ("", "auto") else Checkpoint(resume_from)
        dist_util.broadcast_from_rank_0(_claim, checkpoint, False, log_dir, checkpoint_url() or log_dir)


def claim_folder(checkpoint: Checkpoint | str, overwrite: bool) -> Callable[[str, str], list[str]]:
    """
    A function for logging_to().

    :param checkpoint: that the run begins at, as from open_checkpoint().
    :param overwrite: move the files of another run to a subfolder.
    """
    return functools.partial(_claim, checkpoint, overwrite)


def _claim(checkpoint, overwrite, log_dir, directory):
    """
    :param directory: for checkpoints.
    :return: lines for the log.
    :raises InputError: if a folder holds another run, unless `overwrite`.
    """
    found = _found_by_client(log_dir)
    checkpoint = Checkpoint(found) if found else checkpoint
    auto, named = checkpoint == "auto", isinstance(checkpoint, Checkpoint)
    if (auto and has_checkpoint(directory)) or (named and checkpoint.is_in(directory)):
        return _move(directory, _files(directory, above=checkpoint.step)) if named and overwrite else []
    notes = []
    one_folder = not log_dir or os.path.realpath(log_dir) == os.path.realpath(directory)
    for folder in [directory] if one_folder else [directory, log_dir]:
        if named and checkpoint.is_in(folder):
            continue
        problem = _another_run(folder, auto)
        if overwrite and not is_remote(folder):
            kept = os.path.basename(checkpoint.path) if named else ""
            notes += _move(folder, [name for name in _files(folder) if name != kept])
        elif problem:
            if holder := FolderLock(folder).holder():
                raise InputError(f"{folder}: is in use by another run ({holder}); stop it, or give another folder")
            choices = ["give another folder", *(["--resume_checkpoint auto to continue it"] if not auto else [])]
            if not is_remote(folder):
                aside = os.path.join(folder, _unused(folder))
                choices.append(f"--overwrite True to move its files to {aside} and start over")
            raise InputError(f"{folder}: {problem}; {', or '.join(choices)}")
    return notes


def _found_by_client(log_dir):
    """What train_util.find_resume_checkpoint() finds, which forks replace; it may ask for the log directory."""
    before, Logger.CURRENT = Logger.CURRENT, Logger(log_dir, [])
    try:
        return train_util.find_resume_checkpoint()
    finally:
        Logger.CURRENT = before


def _another_run(folder, auto):
    """
    What shows that a folder is of a run that cannot be continued, in words, or "".

    :param auto: the newest complete checkpoint was looked for, and there is none: resume.find_checkpoint() judges the
                 files of others, and drops the row that a run leaves which ends before its first checkpoint.
    """
    step = None if auto else newest_step(folder)
    if step is not None:
        return f"holds the checkpoints of another run, up to step {step}"
    for name in () if is_remote(folder) else ("progress.csv", "progress.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                lines = sum(1 for _ in itertools.islice(f, 3))
            header, allowed = int(name.endswith("csv")), int(auto)
            if lines - header > allowed:
                return f"holds {name} of another run"
    return ""


def _files(folder, above=None):
    """The names of a run's files in a folder. :param above: only those of later steps."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if above is None:
        return sorted(name for name in names if LOGS.fullmatch(name) or parse_name(name))
    return sorted(name for name in names if (parsed := parse_name(name)) and parsed.step > above)


def _unused(folder):
    names = map(EARLIER.format, itertools.count(1))
    return next(name for name in names if not os.path.lexists(os.path.join(folder, name)))


def _move(folder, names):
    """Move files of a folder to a new subfolder of it. :return: a line for the log, if there are any."""
    if not names:
        return []
    aside = os.path.join(folder, _unused(folder))
    try:
        os.mkdir(aside)
        for name in names:
            os.rename(os.path.join(folder, name), os.path.join(aside, name))
    except OSError as e:
        raise InputError(f"{folder}: the files of another run cannot be moved to {aside} ({first_line(e)})") from None
    return [f"moved {len(names)} files of another run to {aside}"]
