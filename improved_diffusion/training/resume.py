"""
How a run continues: from which checkpoint, and what each of its parts takes from there.

Rank 0 alone reads files, each once. Weights and moments reach the other ranks by broadcast.
"""

import types

import blobfile as bf
import torch as th

from .. import dist_util, logger
from ..data.loader import BatchStream
from ..resample import LossSecondMomentResampler
from .checkpoints import (
    is_in,
    newest_step,
    read_newest_set,
    refuse_cut_off,
    rng_state,
    set_rng_state,
    state_filename,
    step_in,
)
from .contents import MOMENTS, check_state, optimizer_in
from .weights import check_fits

# The global random generators as a part with a state_dict()
RNG = types.SimpleNamespace(state_dict=rng_state, load_state_dict=set_rng_state)


class Checkpoint:
    """
    The files of a checkpoint. What has been read of them is held by rank 0 until it is taken.

    :param path: of the model file.
    :param contents: {file name: contents} of what has been read and found whole.
    """

    def __init__(self, path, contents=None):
        self.path = path
        self.step = step_in(path)  # None for weights that belong to no run: a new one begins at them
        self.state = None  # of the run, on all ranks, once read_state() has read it
        self._contents = contents or {}

    def __getstate__(self):
        return {**self.__dict__, "_contents": {}}  # the other ranks ask rank 0

    def file(self, name):
        """The path of a file of the set."""
        return bf.join(bf.dirname(self.path), name)

    def find(self, name):
        """The path of a file of the set, None if there is none. All ranks call it."""
        path = self.file(name)
        return path if dist_util.from_rank_0(lambda: name in self._contents or bf.exists(path)) else None

    def read(self, name=None):
        """
        Read a file, once, and hold its contents until take(). On this rank alone.

        :param name: None for the model file.
        :return: its contents.
        :raises InputError: if it is absent or damaged.
        """
        name = name or bf.basename(self.path)
        if name not in self._contents:
            self._contents[name] = dist_util.read_state_dict(self.file(name), map_location="cpu")
        return self._contents[name]

    def take(self, name=None):
        """read(), and hold the contents no longer. A second call reads the file again."""
        contents = self.read(name)
        del self._contents[name or bf.basename(self.path)]
        return contents

    def read_state(self, data, schedule_sampler):
        """
        Read the run's state and check each of its fields. All ranks call it.

        :return: the state, None if there is none (a run of the original).
        :raises InputError: if it is not what a run writes.
        """

        name = state_filename(self.step)

        def read():
            contents = self.take(name)
            own_sampler = isinstance(schedule_sampler, LossSecondMomentResampler)
            check_state(contents, self.step, self.file(name), isinstance(data, BatchStream), own_sampler)
            return contents

        self.state = dist_util.from_rank_0(read) if self.find(name) else None
        return self.state


def open_checkpoint(resume_checkpoint, model):
    """
    Read a checkpoint's model file and compare it with the model, before a script creates anything. All ranks call it.

    :param resume_checkpoint: a path; "" and "auto" are returned as they are.
    :return: for TrainLoop.
    :raises InputError: if it cannot be read or does not fit.
    """
    if resume_checkpoint in ("", "auto"):
        return resume_checkpoint
    checkpoint = Checkpoint(resume_checkpoint)
    dist_util.from_rank_0(lambda: check_fits(model, checkpoint.read(), resume_checkpoint))
    return checkpoint


def find_checkpoint(resume_checkpoint, directory):
    """
    The checkpoint that a run continues. All ranks call it.

    :param resume_checkpoint: a Checkpoint; the path of a model file; or "auto", for the newest complete one of
                              `directory`.
    :return: a Checkpoint; None for a new run.
    """
    if resume_checkpoint != "auto":
        checkpoint = resume_checkpoint
        if isinstance(resume_checkpoint, str):
            checkpoint = Checkpoint(resume_checkpoint) if resume_checkpoint else None
        if checkpoint is not None and checkpoint.step is not None:
            dist_util.from_rank_0(refuse_cut_off, checkpoint.path, checkpoint.step)
        return checkpoint
    found = dist_util.from_rank_0(_newest_checkpoint, directory)
    if found is None:
        logger.log(f"no complete checkpoint in {directory}: a new run starts")
        # the row of step 0, if that is all: a run logged it and ended before its first checkpoint
        logger.get_current().drop_from("step", 0, unless_above=0)
    return found


def _newest_checkpoint(directory):
    found = read_newest_set(directory)
    return found and Checkpoint(*found)


def warn_of_other_checkpoints(checkpoint, directory):
    """Warn if `directory`, where a run saves, holds newer checkpoints than the one that it continues."""
    newest = dist_util.from_rank_0(newest_step, directory)
    continues = checkpoint and checkpoint.step is not None and is_in(checkpoint.path, directory)
    if newest is not None and newest > (checkpoint.step if continues else -1):
        logger.warn(
            f"WARNING: {directory} has checkpoints up to step {newest} of another run; this one will overwrite some of "
            "them, and resume_checkpoint auto would take the newest. Give each run its own folder"
        )


# ---------------------------------------------------------------- optimizer


def load_optimizer(opt, read, path, allowed=None, report=()):
    """
    Continue with the moments, betas and eps of an optimizer file. Learning rate, weight decay and the kind of update
    stay what they are. All ranks call it.

    :param read: a function that gives the file's contents; rank 0 calls it.
    :param path: of the file, for messages.
    :param allowed: numbers of parameters that may have moments; None for all parameters.
    :param report: which changes to log, of lr and weight_decay.
    :raises InputError: if the contents do not fit.
    """
    fitted = {}

    def check():
        fitted.update(optimizer_in(read(), opt, path, allowed))
        return fitted["param_groups"], {i: entry["step"] for i, entry in fitted["state"].items()}

    groups, steps = dist_util.from_rank_0(check)
    numbers = [i for group in groups for i in group["params"]]
    params = dict(zip(numbers, (p for group in opt.param_groups for p in group["params"]), strict=True))
    state = fitted.get("state") or {
        i: {"step": step, **{key: th.empty_like(params[i]).detach() for key in MOMENTS}} for i, step in steps.items()
    }
    dist_util.sync_params([state[i][key] for i in sorted(state) for key in MOMENTS])
    now = {name: value for name, value in opt.defaults.items() if name not in ("betas", "eps")}
    log_changes({name: groups[0][name] for name in report}, now)
    opt.load_state_dict({"state": state, "param_groups": [{**group, **now} for group in groups]})


def log_changes(before, now):
    """Log which of the values that two dicts share have changed."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            logger.log(f"{name} is {now[name]} from here on, and was {before[name]} in the checkpoint")


# ---------------------------------------------------------------- parts of a run


class CheckpointIO:
    """
    Saves and restores the parts of a run that have a state_dict().

    :param parts: by the name of their state. The schedule sampler is the same on all ranks; of data, random numbers
                  and statistics, each rank has its own.
    """

    SHARED = "schedule_sampler"

    def __init__(self, **parts):
        self.parts = parts

    def local_state(self):
        """The parts' states on this rank, None for a part without."""
        return {name: part.state_dict() if hasattr(part, "state_dict") else None for name, part in self.parts.items()}

    def load_local_state(self, state):
        for name, part in self.parts.items():
            if state[name] is not None and hasattr(part, "load_state_dict"):
                try:
                    part.load_state_dict(state[name])
                except (ValueError, KeyError) as e:
                    logger.warn(f"the {name.replace('_', ' ')} cannot continue where it was: {e}")

    def state_dict(self):
        """Plain values and tensors; a list of one entry a rank of what differs between ranks. All ranks call it."""
        mine = self.local_state()
        shared = {self.SHARED: mine.pop(self.SHARED)}
        ranks = dist_util.all_gather_object(mine)
        return {**shared, **{name: [rank[name] for rank in ranks] for name in mine}}

    def load_state_dict(self, state, step):
        """
        :param state: of state_dict(), perhaps of another number of ranks.
        :param step: of the run; with another number of ranks it seeds the random numbers.
        """
        ranks = len(state["rng"])
        if ranks == dist_util.world_size():
            mine = {name: state[name][dist_util.rank()] for name in self.parts if name != self.SHARED}
            self.load_local_state({self.SHARED: state[self.SHARED], **mine})
            return
        CheckpointIO(**{self.SHARED: self.parts[self.SHARED]}).load_local_state(state)
        logger.warn(
            f"the checkpoint is of {ranks} ranks, now there are {dist_util.world_size()}: the data begin again, and "
            f"so do the random numbers, from step {step} and the seed, if one is given"
        )
        dist_util.seed_anew(step)
        self.parts["statistics"].load_state_dicts(state["statistics"])
