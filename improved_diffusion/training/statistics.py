"""Means over the steps between two rows of the log."""

import math

import torch as th

from .. import dist_util, logger
from ..utils.errors import TrainingError


class StepStatistics:
    """Means over steps. They stay on the device: no step waits for it. Each entry is a table of (sum, count) rows."""

    def __init__(self):
        self._tables = {}

    def add(self, key, value):
        """Add a scalar tensor."""
        value = value.detach().double()
        self._accumulate(key, th.stack([value, th.ones_like(value)])[None])

    def add_losses(self, diffusion, ts, losses, share=1.0):
        """
        Add losses per sample: their mean over the batch, and over the samples in each quarter of the timesteps.

        :param ts: [N] timesteps.
        :param losses: {name: [N]}.
        :param share: of the step's batch: a step counts once, for any batch size and in any number of parts.
        """
        quartile = 4 * ts // diffusion.num_timesteps
        for key, values in losses.items():
            values = values.detach().double()
            rows = th.stack([values, th.ones_like(values)], dim=1)  # (N, 2)
            quartiles = rows.new_zeros(4, 2).index_add_(0, quartile, rows)
            overall = share * th.stack([values.mean(), rows[0, 1]])
            self._accumulate(key, th.cat([overall[None], quartiles]))

    def _accumulate(self, key, rows):
        self._tables[key] = self._tables.get(key, 0) + rows

    def read(self, over_ranks=True):
        """
        Wait for the device and read the means.

        :param over_ranks: over all ranks (all of them call it), not this one alone.
        :return: {key: (mean, count)}, with key_q0 to key_q3 for the quarters of the timesteps seen.
        """
        rows = th.cat(list(self._tables.values())).tolist() if self._tables else []
        names = []
        for key, table in self._tables.items():
            names += [key] + [f"{key}_q{i}" for i in range(len(table) - 1)]
        mine = dict(zip(names, rows, strict=True))
        sums = {}
        for of_a_rank in dist_util.all_gather_object(mine) if over_ranks else [mine]:  # each may have other keys
            for name, (total, count) in of_a_rank.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + total, before[1] + count
        return {name: (total / count, count) for name, (total, count) in sums.items() if count}

    def clear(self):
        self._tables = {}

    def ranks_not_finite(self, key):
        """The ranks whose own mean of a key is not finite, or that have none; all of them call it."""
        mean, _ = self.read(over_ranks=False).get(key, (math.nan, 0))
        return dist_util.ranks_where(not math.isfinite(mean))

    def diverged(self, what, step, last_checkpoint, bad=()):
        """
        The error to raise, on all ranks together.

        :param bad: the ranks to name; those whose loss is not finite if there are none.
        """
        bad = bad or self.ranks_not_finite("loss") or range(dist_util.world_size())
        where = f"{what} at step {step} on rank {', '.join(map(str, bad))}"
        last = f"the last good checkpoint is {last_checkpoint or 'none'}"
        return TrainingError(f"{where}; {last}. A lower lr helps, or a look at the data")

    def state_dict(self):
        """The sums and counts, for load_state_dict()."""
        return {key: table.cpu() for key, table in self._tables.items()}

    def load_state_dict(self, state):
        """Continue from what state_dict() gave."""
        self._tables = {key: table.to(dist_util.dev()) for key, table in state.items()}

    def load_state_dicts(self, states):
        """Continue from what each of another number of ranks had: rank 0 takes it all."""
        totals = {key: sum(state[key] for state in states if key in state) for state in states for key in state}
        rank_0 = dist_util.rank() == 0
        self.load_state_dict({key: table if rank_0 else th.zeros_like(table) for key, table in totals.items()})


def per_sample(losses, like):
    """
    The terms of a loss as tensors [N], detached: subclasses of a diffusion may return numbers too.

    :param like: [N].
    """
    found = {name: v.detach() if isinstance(v, th.Tensor) else v for name, v in losses.items()}
    return {name: v if getattr(v, "shape", None) == like.shape else v * th.ones_like(like) for name, v in found.items()}


def log_loss_dict(diffusion, ts, losses):
    """
    Log the means of losses by sample, and by quarter of the timesteps under key_q0 to key_q3.

    :param ts: [N] timesteps.
    :param losses: {name: [N]}.
    """
    statistics = StepStatistics()
    statistics.add_losses(diffusion, ts, losses)
    for key, (mean, count) in statistics.read(over_ranks=False).items():
        logger.logkv_mean(key, mean, count)
