"""
Resuming: find the checkpoint, and restore each part of the run from it.

Only rank 0 reads files, each once. It broadcasts weights and moments.
"""

import types

import blobfile as bf
import torch as th

from .. import dist_util, logger
from ..data.loader import BatchStream
from ..resample import LossSecondMomentResampler
from ..utils.streams import counted
from . import checkpoints
from .contents import MOMENTS, check_state, check_weights, optimizer_in
from .weights import check_fits

# The global random generators as a part with a state_dict()
RNG = types.SimpleNamespace(state_dict=checkpoints.rng_state, load_state_dict=checkpoints.set_rng_state)


class Checkpoint:
    """
    The files of a checkpoint. Rank 0 holds their contents from read() to take().

    :param path: of the model file.
    :param contents: {file name: contents} of the files that are read and valid.
    """

    def __init__(self, path, contents=None):
        self.path = path
        self.step = checkpoints.step_in(path)  # None for weights that belong to no run: a new one begins at them
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
        return path if dist_util.broadcast_from_rank_0(lambda: name in self._contents or bf.exists(path)) else None

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

    def forget(self):
        """Free contents that were not taken, such as averages of other rates."""
        self._contents, self.state = {}, None

    def is_in(self, directory):
        """Whether this is a run's checkpoint in a folder."""
        return self.step is not None and checkpoints.is_in(self.path, directory)

    def read_state(self, data, schedule_sampler):
        """
        Read the run's state and check each of its fields. All ranks call it.

        :return: the state, None if there is none (a run of the original).
        :raises InputError: if it is not what a run writes.
        """

        name = checkpoints.state_filename(self.step)

        def read():
            contents = self.take(name)
            own_sampler = isinstance(schedule_sampler, LossSecondMomentResampler)
            check_state(contents, self.step, self.file(name), isinstance(data, BatchStream), own_sampler)
            return contents

        self.state = dist_util.broadcast_from_rank_0(read) if self.find(name) else None
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
    dist_util.broadcast_from_rank_0(lambda: check_fits(model, checkpoint.read(), resume_checkpoint))
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
            dist_util.broadcast_from_rank_0(checkpoints.refuse_cut_off, checkpoint.path, checkpoint.step)
        return checkpoint
    found = dist_util.broadcast_from_rank_0(_newest_checkpoint, directory)
    if found is None:
        logger.log(f"no checkpoint in {directory} yet: a new run starts")
        # the row of step 0, if that is all: a run logged it and ended before its first checkpoint
        logger.get_current().drop_from("step", 0, unless_above=0)
    return found


def _newest_checkpoint(directory):
    found = checkpoints.read_newest_set(directory)
    return found and Checkpoint(*found)


def warn_of_other_checkpoints(checkpoint, directory):
    """Warn if `directory`, where a run saves, holds newer checkpoints than the one that it continues."""
    newest = dist_util.broadcast_from_rank_0(checkpoints.newest_step, directory)
    if newest is not None and newest > (checkpoint.step if checkpoint and checkpoint.is_in(directory) else -1):
        problem = f"{directory} has checkpoints up to step {newest} that this run does not continue"
        outcome = "it will overwrite some of them, and resume_checkpoint auto would take the newest"
        logger.warn(f"WARNING: {problem}; {outcome}. Give each run its own folder")


# ---------------------------------------------------------------- averages and moments


def load_average(checkpoint, rate, step, params, model, to_master_params, strict=True):
    """
    Load the average of an EMA rate into `params`, in place, if the checkpoint has it. All ranks call it.

    :param to_master_params: a function from a state dict to tensors like `params`.
    :param strict: refuse a file that does not fit the model.
    :raises InputError: if the file does not fit.
    """
    name = checkpoints.ema_filename(rate, step)
    path = checkpoint and checkpoint.find(name)
    if not path:
        logger.log(f"there is no checkpoint of EMA {rate}: it starts at the model's parameters")
        return

    @th.no_grad()
    def load():
        state_dict = checkpoint.take(name)
        if strict:
            check_weights(state_dict, model, path, strict=True)
        for mine, value in zip(params, to_master_params(state_dict), strict=True):
            mine.copy_(value)

    logger.log(f"loading EMA from checkpoint: {path}...")
    dist_util.broadcast_from_rank_0(load)
    dist_util.sync_params(params)


def load_optimizer(opt, checkpoint, step, may_be_empty=False, report=()):
    """
    Continue with the moments, betas and eps of an optimizer file, if there is one. Learning rate, weight decay and the
    kind of update stay what they are. All ranks call it.

    :param may_be_empty: whether a file without moments fits, where the run's state does not say how many there are.
    :param report: which changes to log, of lr and weight_decay.
    :raises InputError: if the contents do not fit.
    """
    name = checkpoints.optimizer_filename(step)
    path = checkpoint and checkpoint.find(name)
    if not path:
        logger.log("there is no checkpoint of the optimizer: it starts without moments")
        return
    logger.log(f"loading optimizer state from checkpoint: {path}")
    params = [p for group in opt.param_groups for p in group["params"]]
    allowed = [len(params), 0] if may_be_empty else [len(params)]
    if checkpoint.state and "moments" in checkpoint.state:
        allowed = [checkpoint.state["moments"]]  # a parameter that has had no gradient has none
    fitted = {}

    def check():
        fitted.update(optimizer_in(checkpoint.take(name), opt, path, allowed))
        return fitted["param_groups"], {i: entry["step"] for i, entry in fitted["state"].items()}

    groups, steps = dist_util.broadcast_from_rank_0(check)
    like = dict(zip((i for group in groups for i in group["params"]), params, strict=True))
    state = fitted.get("state") or {
        i: {"step": step, **{key: th.empty_like(like[i]).detach() for key in MOMENTS}} for i, step in steps.items()
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

    def local_state(self, *names):
        """{name: state on this rank, None for a part without} of these parts."""
        parts = [(name, self.parts[name]) for name in names]
        return {name: part.state_dict() if hasattr(part, "state_dict") else None for name, part in parts}

    def load_local_state(self, states):
        """Restore the parts that local_state() gave the states of."""
        for name, state in states.items():
            if state is not None and hasattr(self.parts[name], "load_state_dict"):
                try:
                    self.parts[name].load_state_dict(state)
                except (ValueError, KeyError) as e:
                    logger.warn(f"WARNING: the {name.replace('_', ' ')} cannot continue where it was: {e}")

    def state_dict(self):
        """Plain values and tensors; a list of one entry a rank of what differs between ranks. All ranks call it."""
        own = [name for name in self.parts if name != self.SHARED]
        ranks = dist_util.all_gather_object(self.local_state(*own))
        return {**self.local_state(self.SHARED), **{name: [rank[name] for rank in ranks] for name in own}}

    def load_state_dict(self, state, step):
        """
        :param state: of state_dict(), perhaps of another number of ranks.
        :param step: of the run; with another number of ranks it seeds the random numbers.
        """
        self.load_local_state({self.SHARED: state[self.SHARED]})
        ranks, rank = len(state["rng"]), dist_util.rank()
        if ranks == dist_util.world_size():
            self.load_local_state({name: state[name][rank] for name in self.parts if name != self.SHARED})
            return
        logger.warn(
            f"the checkpoint is of {counted(ranks, 'rank')}, now there are {dist_util.world_size()}: the data begin "
            f"again, and so do the random numbers, from step {step} and the seed, if one is given"
        )
        dist_util.reseed(step)
        self.parts["statistics"].load_state_dicts(state["statistics"])
