"""
How a run goes on: from which checkpoint, and what each of its parts takes from there.

All ranks call these functions together; rank 0 looks at the files.
"""

from .. import dist_util, logger
from ..data.loader import BatchStream
from ..fp16_util import make_master_params
from ..resample import LossSecondMomentResampler
from ..utils.errors import InputError
from .checkpoints import (
    find_ema_checkpoint,
    find_newest_checkpoint,
    find_optimizer_checkpoint,
    find_state_checkpoint,
    is_in,
    is_of_a_run,
    newest_step,
    parse_resume_step_from_filename,
    rng_state,
    set_rng_state,
)
from .contents import averages_in, check_state, check_weights, optimizer_in

LONGEST_OVERFLOW = 20  # steps until the loss scale that a run begins with is small enough


def find_checkpoint(resume_checkpoint, directory):
    """
    The model file that a run continues from.

    :param resume_checkpoint: its path; or "auto", for the newest complete one of `directory`.
    :return: the path; None or "" for none.
    """
    if resume_checkpoint != "auto":
        return resume_checkpoint
    path = dist_util.from_rank_0(find_newest_checkpoint, directory)
    if path is None:
        logger.log(f"no complete checkpoint in {directory}: the run begins anew")
        # the row of step 0, if that is all: a run logged it and ended before its first checkpoint
        logger.get_current().drop_from("step", 0, unless_above=0)
    return path


def warn_of_other_checkpoints(main_checkpoint, directory):
    """Of a run that this one, which saves to `directory`, does not continue: both would lose by it."""
    newest = dist_util.from_rank_0(newest_step, directory)
    goes_on_here = main_checkpoint and is_of_a_run(main_checkpoint) and is_in(main_checkpoint, directory)
    step = parse_resume_step_from_filename(main_checkpoint) if goes_on_here else -1
    if newest is not None and newest > step:
        logger.warn(
            f"WARNING: {directory} has checkpoints up to step {newest} of a run that this one does not continue; it "
            "will overwrite some of them, and resume_checkpoint auto would take the newest. A run wants its own folder"
        )


def find_files_beside(main_checkpoint, ema_rates):
    """The paths of a checkpoint's other files: (one for each EMA rate, optimizer, state), None for what is missing."""

    def find():
        step = parse_resume_step_from_filename(main_checkpoint)
        return (
            [find_ema_checkpoint(main_checkpoint, step, rate) for rate in ema_rates],
            find_optimizer_checkpoint(main_checkpoint, step),
            find_state_checkpoint(main_checkpoint, step),
        )

    return dist_util.from_rank_0(find)


def load_model(model, path):
    """
    Load a model file into a network.

    :raises InputError: if it does not fit.
    """
    logger.log(f"loading model from checkpoint: {path}...")
    params = dist_util.load_state_dict(path, map_location=dist_util.dev())
    check_weights(params, model, path)
    try:
        model.load_state_dict(params)  # by itself: a subclass may accept other names
    except (RuntimeError, TypeError, AttributeError) as e:  # the last two if it is no dict of names
        reason = str(e).splitlines()[:2][-1].strip()
        raise InputError(f"{path} does not fit the model: {reason}") from None


def read_ema(model, path):
    """
    :return: the averages in a file, tensors in the order of the network's parameters.
    :raises InputError: if they do not fit.
    """
    logger.log(f"loading EMA from checkpoint: {path}...")
    return averages_in(dist_util.load_state_dict(path, map_location=dist_util.dev()), model, path)


def read_optimizer(opt, path, allowed=None):
    """
    Read an optimizer's state, if there is a file.

    :param allowed: of how many parameters there may be moments; of all if None.
    :return: a state dict for load_optimizer(), None without a file.
    :raises InputError: if it does not fit.
    """
    if not path:
        logger.log("there is no checkpoint of the optimizer: it begins anew")
        return None
    logger.log(f"loading optimizer state from checkpoint: {path}")
    return optimizer_in(dist_util.load_state_dict(path, map_location="cpu"), opt, path, allowed)


def load_optimizer(opt, state_dict, told=()):
    """
    Continue with the moments, betas and eps that read_optimizer() gave. Learning rate, weight decay and the kind of
    update stay what they are.

    :param told: those of the first two whose change is logged.
    """
    now = {name: value for name, value in opt.defaults.items() if name not in ("betas", "eps")}
    before = {name: state_dict["param_groups"][0][name] for name in told}
    for group in state_dict["param_groups"]:
        group.update(now)
    opt.load_state_dict(state_dict)
    log_changes(before, now)


def read_state(path, label, *, data, schedule_sampler):
    """
    :param label: the step in the file's name.
    :return: the state of a run, each field checked.
    :raises InputError: if it is not what a run writes.
    """
    state = dist_util.load_state_dict(path, map_location="cpu")
    own_sampler = isinstance(schedule_sampler, LossSecondMomentResampler)
    check_state(state, label, path, own_data=isinstance(data, BatchStream), own_sampler=own_sampler)
    return state


def log_changes(before, now):
    """Log which of the values that two dicts share have changed."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            logger.log(f"{name} is {now[name]} from here on, and was {before[name]} in the checkpoint")


# ---------------------------------------------------------------- parts that differ from rank to rank


def state_of_parts(*, schedule_sampler, data, statistics):
    """What load_parts() continues from: plain values and tensors, lists of one entry a rank."""
    ranks = dist_util.all_gather_object(
        {"data": _state_of(data), "rng": rng_state(), "statistics": statistics.state_dict()}
    )
    return {"schedule_sampler": _state_of(schedule_sampler), **{key: [rank[key] for rank in ranks] for key in ranks[0]}}


def load_parts(state, step, *, schedule_sampler, data, statistics):
    """
    Let a run's parts, and the random numbers, go on where state_of_parts() found them.

    :param step: of the run, which random numbers begin anew from if the number of ranks is another.
    """
    _continue(schedule_sampler, "schedule sampler", state["schedule_sampler"])
    ranks, rank = len(state["rng"]), dist_util.rank()
    if ranks == dist_util.world_size():
        _continue(data, "data", state["data"][rank])
        set_rng_state(state["rng"][rank])
        statistics.load_state_dict(state["statistics"][rank])
    else:
        logger.warn(
            f"the checkpoint is of {ranks} ranks, now there are {dist_util.world_size()}: the data begin anew, and "
            f"so do the random numbers, from step {step} and the seed, if one is given"
        )
        dist_util.seed_anew(step)
        statistics.load_state_dicts(state["statistics"])


def position(data):
    """Where data and random numbers are on this rank, for return_to()."""
    return _state_of(data), rng_state()


def return_to(position, data):
    """Undo what has been taken from data, and drawn, since position() gave `position`."""
    state, rng = position
    if state is not None and hasattr(data, "load_state_dict"):
        data.load_state_dict(state)
    set_rng_state(rng)


def _state_of(part):
    """state_dict() of a data iterator or sampler that has one, else None."""
    return part.state_dict() if hasattr(part, "state_dict") else None


def _continue(part, name, state):
    if state is None or not hasattr(part, "load_state_dict"):
        return
    try:
        part.load_state_dict(state)
    except (ValueError, KeyError) as e:
        logger.warn(f"the {name} cannot continue where it was: {e}")


# ---------------------------------------------------------------- the loop


class Resumable:
    """What TrainLoop keeps in a checkpoint's state file, and takes from a checkpoint when it resumes."""

    def _resume(self, main_checkpoint, directory):
        """
        Take from a checkpoint all but the model, which is loaded by now.

        :param directory: where this run's checkpoints go.
        """
        self._last_checkpoint = main_checkpoint
        self._updates = self.resume_step
        if not is_of_a_run(main_checkpoint):
            logger.log(f"{main_checkpoint} is not a model000000.pt: a new run begins at its weights")
            return
        label = parse_resume_step_from_filename(main_checkpoint)
        ema_paths, opt_path, state_path = find_files_beside(main_checkpoint, self.ema_rate)
        # all is read and checked before any of it is used
        averages = [path and read_ema(self.model, path) for path in ema_paths]
        state = state_path and read_state(state_path, label, data=self.data, schedule_sampler=self.schedule_sampler)
        optimizer = read_optimizer(self.opt, opt_path, self._counts_of_moments(state, label))
        for i, params in enumerate(averages):
            if params:
                self.ema_params[i] = make_master_params(params) if self.use_fp16 else params
            else:
                logger.log(f"there is no checkpoint of EMA {self.ema_rate[i]}: it begins at the model's parameters")
        if optimizer:
            # an annealed learning rate is another at every step
            load_optimizer(self.opt, optimizer, ["weight_decay"] if self.lr_anneal_steps else ["lr", "weight_decay"])
        if state:
            self._load_state(state)
            if is_in(main_checkpoint, directory):
                logger.get_current().drop_from("step", self.step)  # rows that will be written again
        self._saved = label, self._updates

    def _counts_of_moments(self, state, label):
        """Of how many parameters an optimizer file may have moments: those that have had a gradient."""
        if state and "moments" in state:
            return [state["moments"]]
        # before the first update there are none, which comes as late as float16 overflows
        return [len(self.master_params), *([0] if self.use_fp16 and label <= LONGEST_OVERFLOW else [])]

    def _load_state(self, state):
        self.step, self.resume_step = state["updates"], 0
        self._updates = state["updates"]
        self.lg_loss_scale = state["lg_loss_scale"]
        self._overflows_in_a_row = state["overflows_in_a_row"]
        told = {"resume_checkpoint", "seed", "lr", "weight_decay"}  # elsewhere, or nothing to tell
        log_changes(state.get("flags", {}), {k: v for k, v in self.flags.items() if k not in told})
        load_parts(state, self.step, **self._parts())

    def _state(self):
        return {
            "updates": max(self._updates, self._total_step),  # subclasses may not count them
            "lg_loss_scale": self.lg_loss_scale,
            "overflows_in_a_row": self._overflows_in_a_row,
            "moments": sum(map(bool, self.opt.state.values())),
            "flags": self.flags,
            **state_of_parts(**self._parts()),
        }

    def _parts(self):
        return dict(schedule_sampler=self.schedule_sampler, data=self.data, statistics=self._statistics)
