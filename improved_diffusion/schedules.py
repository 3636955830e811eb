"""Noise schedules, and how the numbers of a schedule's tables reach the samples of a batch."""

import math
import weakref

import numpy as np
import torch as th


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """
    The variances beta of a schedule's steps.

    "linear" is Ho et al.'s 1e-4 ... 0.02 for 1000 steps, scaled so that other step counts end
    equally noisy. "cosine" is the paper's equation 17.

    :return: float64 array [num_diffusion_timesteps].
    :raises NotImplementedError: for another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"unknown beta schedule {schedule_name!r}: there are linear and cosine")


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """
    Betas whose running product of 1 - beta follows a given curve.

    :param alpha_bar: maps the fraction 0...1 of the process that has passed to the product there.
    :param max_beta: upper bound, below 1 to keep the last steps from being singular.
    :return: float64 array [num_diffusion_timesteps].
    """
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)])


def at_timesteps(tables, timesteps, dims):
    """
    The entries of several tables at the timesteps, in one go.

    :param tables: numpy arrays [T], all of floats or all of integers.
    :param timesteps: integer tensor [N], whose device the results have.
    :param dims: how many axes they get.
    :return: a tensor [N, 1, 1, ...] for each table, float32 or int64, shaped to multiply data of that many axes.
    """
    shape = len(tables), -1, *[1] * (dims - 1)
    if timesteps.device.type == "cpu":
        # numpy's look-ups cost a fraction of torch's, and see a table that was changed in place
        i = timesteps.numpy()
        return [th.from_numpy(row) for row in _rows([table[i] for table in tables]).reshape(shape)]
    return _copy_on(timesteps.device, tables)[:, timesteps].view(shape).unbind()


_copies = {}  # (device, ids of the arrays) -> their copy there, for as long as the arrays live


def _copy_on(device, tables):
    """The tables as one tensor [len(tables), T] on a device, which keeps it: no step of a loop waits for a transfer."""
    key = device, *map(id, tables)
    if key not in _copies:
        with th.inference_mode(False):  # whoever trains later needs a copy made while sampling, too
            _copies[key] = th.from_numpy(_rows(tables)).to(device)
        for table in tables:
            weakref.finalize(table, _copies.pop, key, None)
    return _copies[key]


def _rows(arrays):
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite there
        return np.array(arrays, dtype=np.int64 if arrays[0].dtype.kind in "iu" else np.float32)


def one_a_sample(values):
    """[N, C, ...] as [N, 1, ...] where it is a view that repeats one value a sample, else as it is."""
    if any(values.stride()[1:]):
        return values
    return values.as_strided((values.shape[0], *[1] * (values.dim() - 1)), values.stride())


def add_to(own, other, alpha=1):
    """own + alpha * other in the memory of `own`, which the caller gives up, where that holds the sum."""
    if own.shape == other.shape and own.dtype == other.dtype:
        return own.add_(other, alpha=alpha)
    return th.add(own, other, alpha=alpha)
