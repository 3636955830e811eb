"""Noise schedules, and how the numbers of a schedule's tables reach the samples of a batch."""

import math
import weakref
from collections.abc import Callable

import numpy as np
import torch as th


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
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


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """
    Betas whose running product of 1 - beta follows a given curve.

    :param alpha_bar: maps the fraction 0...1 of the process that has passed to the product there.
    :param max_beta: upper bound, below 1 to keep the last steps from being singular.
    :return: float64 array [num_diffusion_timesteps].
    """
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)])


# ---------------------------------------------------------------- tables on devices


def _extract_into_tensor(arr: np.ndarray, timesteps: th.Tensor, broadcast_shape: tuple[int, ...]) -> th.Tensor:
    """
    arr[timesteps] as float32, with further axes at its end: timesteps [N] give one value a sample.

    :param arr: [T].
    :param timesteps: integers of any shape that broadcasts against the first axes of broadcast_shape; -1 is the last.
    :return: a view of broadcast_shape, on the device of the timesteps.
    """
    values = _on_device(arr, timesteps)[timesteps]
    return values.view(*values.shape, *[1] * (len(broadcast_shape) - values.dim())).expand(broadcast_shape)


_copies: dict = {}  # (id of a read-only array, device) -> its copy there, for as long as the array lives


def _on_device(arr, like):
    """A float32 copy of an array on the device of `like`: the same one each time, if the array is read-only."""
    if not is_eager(like) or arr.flags.writeable:
        return th.asarray(arr, dtype=th.float32, device=like.device, copy=True)
    key = id(arr), like.device
    if key not in _copies:
        with th.inference_mode(False):  # training may use it later
            _copies[key] = th.asarray(arr, dtype=th.float32, device=like.device, copy=True)
        weakref.finalize(arr, _copies.pop, key, None)
    return _copies[key]


def is_eager(x: th.Tensor) -> bool:
    """Whether x holds values: not while torch.compile() traces, nor for a subclass such as FakeTensor."""
    return not th.compiler.is_compiling() and type(x) is th.Tensor


def read_only(array: np.ndarray) -> np.ndarray:
    """The array, no longer writable, or a copy of it where it is a view: whoever has its base could change it."""
    array = array.copy() if array.base is not None else array
    array.setflags(write=False)
    return array
