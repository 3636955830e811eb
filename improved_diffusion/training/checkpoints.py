"""
Checkpoints: write, find, read and delete them.

A checkpoint is a set of files with one step in their names:

    model000010.pt        the network's state dict
    ema_0.9999_000010.pt  the same, averaged, one for each EMA rate
    opt000010.pt          the optimizer's state dict
    state000010.pt        step, loss scale, data, random generators: a resumed run equals an uninterrupted one

The original writes the first three. The fourth names the others and is written last: it marks a complete set.
"""

import functools
import io
import math
import os
import pickle
import random
import re
from typing import NamedTuple

import blobfile as bf
import numpy as np
import torch as th

from .. import dist_util, logger
from ..utils.errors import FileAccessError, InputError, first_line
from ..utils.files import TEMPORARY, is_remote, list_folder, rename_files, write_files
from ..utils.row_files import number
from .contents import files_in

NAME = re.compile(
    r"(?P<kind>model|opt|state|ema_(?P<rate>[^_]+)_)(?P<step>\d{6,})\.(?P<ending>pt|safetensors)"
    r"|(?P<preview>preview)_(?P<of>\d{6,})(?:_model)?\.png"
)


class Name(NamedTuple):
    """What the name of a run's file says."""

    kind: str  # model, ema, opt, state, preview
    step: int
    rate: float  # of an average; NaN if it is no number
    ending: str


def parse_name(name: str) -> Name | None:
    """The parts of a file name, which may be a temporary one; None for other files than a run's."""
    match = NAME.fullmatch(name.removesuffix(TEMPORARY))
    if match is None:
        return None
    if match["preview"]:
        return Name("preview", int(match["of"]), math.nan, "png")
    return Name(match["kind"].partition("_")[0], int(match["step"]), number(match["rate"]), match["ending"])


def model_filename(step):
    return f"model{step:06d}.pt"


def ema_filename(rate, step):
    return f"ema_{rate}_{step:06d}.pt"


def optimizer_filename(step):
    return f"opt{step:06d}.pt"


def state_filename(step):
    return f"state{step:06d}.pt"


def parse_resume_step_from_filename(filename):
    """The step in a name such as path/to/model000100.pt; 0 if it has none."""
    return step_in(filename) or 0


def step_in(filename):
    """The step in the name of a run's model file; None for any other, such as an ema_ file: it starts a new run."""
    _, found, end = bf.basename(filename).rpartition("model")
    digits = end.split(".")[0]
    return int(digits) if found and digits.isdecimal() else None


def find_ema_checkpoint(main_checkpoint, step, rate):
    """The path of the EMA file beside a model file, None if there is none."""
    if not main_checkpoint:
        return None
    path = bf.join(bf.dirname(main_checkpoint), ema_filename(rate, step))
    return path if bf.exists(path) else None


def refuse_cut_off(main_checkpoint, step):
    """:raises InputError: if a crash left the set of a model file incomplete."""
    directory = bf.dirname(main_checkpoint) or "."
    sets = _sets_in(directory)
    state, names = state_filename(step), sets.get(step, set())
    # at a URL there are no temporary names, but earlier sets with a state: the original writes none
    if state not in names and (state + TEMPORARY in names or _first_of_ours(sets) < step):
        advice = "resume from the one before it, or by auto, which completes it if it can"
        raise InputError(f"{main_checkpoint} belongs to a checkpoint whose writing was cut off; {advice}")


def read_newest_set(directory, list_again=True):
    """
    Read the newest complete checkpoint in a folder. On this rank alone.

    Complete means that all files are there and undamaged; newer ones that are damaged are logged. One of
    the original, which is older than all with a state file, is complete with model and optimizer. One whose writing was
    cut off between the renames is completed.

    :param list_again: once more, if files were deleted while they were read.
    :return: (path of the model file, {name: contents} of the files); None if there is none.
    :raises InputError: if there are files of checkpoints, but none is complete, or one may not be read: a new run
                        would overwrite what may be mended. The rest of a first save that was cut off does not count.
    """
    problem = None
    sets = _sets_in(directory)
    first_of_ours = _first_of_ours(sets)
    for step, names in sorted(sets.items(), reverse=True):
        contents = _complete(directory, step, names) if _is_cut_off(step, names) else None
        if contents is None and not _is_complete(step, names, first_of_ours):
            continue  # its writing or deletion was cut off
        try:
            contents = contents or _read_set(directory, step, {n for n in names if not n.endswith(TEMPORARY)})
        except FileAccessError:
            raise
        except InputError as e:
            if list_again and not names <= _sets_in(directory).get(step, set()):
                return read_newest_set(directory, list_again=False)
            logger.warn(f"the checkpoint of step {step} is left out: {e}")
            problem = problem or e
            continue
        return bf.join(directory, model_filename(step)), contents
    if problem:
        raise InputError(f"no checkpoint in {directory} can be read; to start over, take another folder. {problem}")
    left = sorted(name for names in sets.values() for name in names if not name.endswith(TEMPORARY))
    if left and not (is_remote(directory) and sets.keys() == {0}):  # where a first save has no temporary names
        problem = f"no checkpoint in {directory} is complete, but there are files of some ({left[0]})"
        raise InputError(f"{problem}; to start over, take another folder, or move them")
    return None


def _complete(directory, step, names):
    """
    Give a set's temporary files their names, if all of them are whole: the state, which names the others, is written
    last.

    :param names: of the set's files, temporary ones too, without a state file.
    :return: {name: contents}; None if the set stays incomplete.
    :raises FileAccessError: if a file may not be read.
    """
    state = state_filename(step)
    if state + TEMPORARY not in names or not os.path.isfile(os.path.join(directory, state + TEMPORARY)):
        return None  # a device such as /dev/full has no end
    try:
        contents = _read_set(directory, step, {state}, temporary={n for n in names if n.endswith(TEMPORARY)})
    except FileAccessError:
        raise
    except InputError:  # damaged, not a state, or without one of its files
        return None
    if model_filename(step) not in contents:
        return None
    rename_files(directory, [name for name in contents if name != state] + [state])
    logger.log(f"the checkpoint of step {step}, whose writing was cut off behind its last file, is complete now")
    return contents


def _read_set(directory, step, names, temporary=frozenset()):
    """
    Read the files of a set, and those that its state names.

    :param temporary: names that exist, with their ending; such a file is read in place of the final one.
    :return: {name without that ending: contents}.
    :raises InputError: naming the file that is missing or damaged.
    """
    contents, state = {}, state_filename(step)

    def read(name):
        path = bf.join(directory, name + TEMPORARY if name + TEMPORARY in temporary else name)
        contents[name] = dist_util.read_state_dict(path, map_location="cpu")

    if state in names:
        read(state)
        names = names | set(files_in(contents[state], step, bf.join(directory, state)))
    for name in sorted(names - {state}):
        read(name)
    return contents


def _first_of_ours(sets):
    """The step of the first set with a state file, infinity if there is none: those before are of the original."""
    return min((step for step, names in sets.items() if state_filename(step) in names), default=math.inf)


def _is_complete(step, names, first_of_ours):
    """Whether a set has, by its names, the model and what is written last."""
    last = state_filename(step) if step >= first_of_ours else optimizer_filename(step)
    return {model_filename(step), last} <= names and not _is_cut_off(step, names)


def newest_step(directory):
    """The largest number in the name of a model file in a folder, None if there is none."""
    return max((step for step, names in _sets_in(directory).items() if model_filename(step) in names), default=None)


def newest_average(directory: str, rates: str = "") -> str | None:
    """
    The path of the newest ema_ file in a folder, None if there is none.

    :param rates: of the run, separated by commas: of several files of a step, the first rate's.
    :raises InputError: if they are no numbers.
    """
    order = [number(rate) for rate in rates.split(",") if rate]
    if any(map(math.isnan, order)):
        raise InputError(f"{directory}: the run's ema_rate {rates!r} is not numbers separated by commas")

    def rank(name):
        _, step, rate, _ = parse_name(name)
        return step, -order.index(rate) if rate in order else -len(order), rate

    names = [name for name in (list_folder(directory) if bf.isdir(directory) else ()) if name.endswith(".pt")]
    averages = [name for name in names if (parsed := parse_name(name)) and parsed.rate >= 0]
    return bf.join(directory, max(averages, key=rank)) if averages else None


def has_checkpoint(directory):
    """Whether a folder has a checkpoint that read_newest_set() may find, by the names of its files."""
    sets = _sets_in(directory)
    first_of_ours = _first_of_ours(sets)
    staged = any(state_filename(step) + TEMPORARY in names for step, names in sets.items())
    return staged or any(_is_complete(step, names, first_of_ours) for step, names in sets.items())


def delete_old_sets(directory, step, keep):
    """
    Delete all but the newest `keep` of the checkpoints up to `step`, and the rest of those whose writing or deletion
    was cut off. Files that a user keeps, such as an average alone, stay.
    """
    sets = _sets_in(directory)
    first_of_ours = _first_of_ours(sets)
    complete = sorted(k for k, names in sets.items() if k <= step and _is_complete(k, names, first_of_ours))
    oldest_kept = complete[-keep] if len(complete) >= keep else 0
    for k, names in sorted(sets.items()):
        if model_filename(k) in names and not _is_cut_off(k, names):
            goes = k < oldest_kept
        else:  # without model, state or optimizer can only be the rest of a set
            goes = k <= step and (_is_cut_off(k, names) or {state_filename(k), optimizer_filename(k)} & names)
        for name in sorted(names, key=_order_of_deletion) if goes else ():
            _delete(bf.join(directory, name))
    for name in () if is_remote(directory) else list_folder(directory):
        if name.endswith(TEMPORARY) and (parsed := parse_name(name)) and parsed.kind == "preview":
            _delete(bf.join(directory, name))


def _order_of_deletion(name):
    """
    The model first: without it the rest is no checkpoint. State, optimizer and temporary files last: by them
    delete_old_sets() recognizes the rest. The state's temporary file after those that it could complete.
    """
    temporary = name.endswith(TEMPORARY)
    kinds = [name.startswith(kind) for kind in ("state", "opt", "ema", "model")]
    return kinds[0] and not temporary, temporary, kinds


def _delete(path):
    try:
        bf.remove(path)
    except (OSError, bf.Error) as e:
        logger.warn(f"{path}: cannot be deleted ({first_line(e)})")


def _is_cut_off(step, names):
    return state_filename(step) not in names and any(name.endswith(TEMPORARY) for name in names)


def _sets_in(directory):
    """
    {step: names of its files, temporary ones too} of all checkpoints in a folder.

    :raises FileAccessError: if it cannot be listed.
    """
    sets = {}
    try:
        listed = list(list_folder(directory)) if bf.isdir(directory) else ()
    except OSError as e:
        raise FileAccessError(f"{directory}: cannot be listed ({first_line(e)})") from None
    for name in listed:
        if (parsed := parse_name(name)) and parsed.ending == "pt":
            sets.setdefault(parsed.step, set()).add(name)
    return sets


def is_in(path, directory):
    """Whether a local file lies in a folder, however the two are spelled."""
    return os.path.realpath(os.path.dirname(path)) == os.path.realpath(directory)


def save_set(directory, step, *, model, emas, optimizer, state):
    """
    Write one checkpoint. Contents are what torch.save takes, state dicts and plain values.

    :param emas: {rate: state dict}.
    :return: the path of the model's file.
    :raises InputError: if a file cannot be written; what was there before is untouched.
    """
    contents = {model_filename(step): model}
    contents.update({ema_filename(rate, step): params for rate, params in emas.items()})
    contents[optimizer_filename(step)] = optimizer
    state = {**state, "files": list(contents)}
    writers = {name: functools.partial(_save_from_cpu, value) for name, value in contents.items()}
    write_files(directory, {**writers, state_filename(step): functools.partial(_save_state, state)})
    return bf.join(directory, model_filename(step))


def _save_from_cpu(contents, f):
    """torch.save() of CPU copies, made file by file: a file that loads anywhere, and no second model on a GPU."""

    def copied(value):
        if isinstance(value, th.Tensor):
            return value.detach().to("cpu", copy=True)  # a copy, since a view takes all that it is a view of along
        if isinstance(value, dict):
            return {k: copied(v) for k, v in value.items()}
        return [copied(v) for v in value] if isinstance(value, list) else value

    th.save(copied(contents), f)


def _save_state(state, f):
    """:raises InputError: for what could be saved, but not loaded again."""
    saved = io.BytesIO()
    _save_from_cpu(state, saved)
    saved.seek(0)
    try:
        th.load(saved, weights_only=True)
    except pickle.UnpicklingError:
        state = {key: state[key] for key in ("data", "schedule_sampler", "flags") if key in state}
        problem = f"is more than tensors and plain values: {state}"
        raise InputError(f"the state of data, schedule sampler or flags {problem}") from None
    f.write(saved.getbuffer())


def rng_state():
    """The global generators of torch (this rank's device too), numpy and random, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": th.get_rng_state(),
        "numpy": [name, th.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }
    if th.cuda.is_available():
        state["cuda"] = th.cuda.get_rng_state(dist_util.dev())
    return state


def set_rng_state(state):
    """Undo what has been drawn since rng_state() gave `state`."""
    th.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "python" in state:  # earlier runs did not save it
        random.setstate(state["python"])
    if "cuda" in state and th.cuda.is_available():
        th.cuda.set_rng_state(state["cuda"], dist_util.dev())
