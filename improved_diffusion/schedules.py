"""Noise schedules, and lookups in their tables on a device."""

import math
import weakref
from collections.abc import Callable

import numpy as np
import torch as th


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """
    Betas, float64 [num_diffusion_timesteps].

    :param schedule_name: "linear" (Ho et al. 2020, arXiv 2006.11239: 1e-4 to 0.02 at 1000 steps, scaled for other
        numbers of steps) or "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17).
    :raises NotImplementedError: for another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"unknown beta schedule {schedule_name!r}: choose linear or cosine")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """
    Betas, float64 [num_diffusion_timesteps], for a given cumulative product of 1 - beta.

    :param alpha_bar: the product at t / T in [0, 1].
    :param max_beta: upper bound; below 1, so that the last steps are not singular.
    """
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)])


# ---------------------------------------------------------------- tables on devices


def _extract_into_tensor(arr: np.ndarray, timesteps: th.Tensor, broadcast_shape: tuple[int, ...]) -> th.Tensor:
    """
    arr[timesteps] as float32, expanded along trailing axes to broadcast_shape.

    :param arr: [T].
    :param timesteps: integers, [N] or a shape that broadcasts against the first axes of broadcast_shape.
    :return: a view of broadcast_shape on the timesteps' device.
    """
    values = _on_device(arr, timesteps)[timesteps]
    return values.view(*values.shape, *[1] * (len(broadcast_shape) - values.dim())).expand(broadcast_shape)


_copies: dict = {}  # (id of a read-only array, device) -> its copy there, until the array is freed


def _on_device(arr, like):
    """A float32 copy of the array on the device of `like`, cached if the array is read-only."""
    if not is_eager(like) or arr.flags.writeable:
        return th.asarray(arr, dtype=th.float32, device=like.device, copy=True)
    key = id(arr), like.device
    if key not in _copies:
        with th.inference_mode(False):  # else training could not use the cached tensor
            _copies[key] = th.asarray(arr, dtype=th.float32, device=like.device, copy=True)
        weakref.finalize(arr, _copies.pop, key, None)
    return _copies[key]


def is_eager(x: th.Tensor) -> bool:
    """Whether x holds values: False under torch.compile() and for subclasses such as FakeTensor."""
    return not th.compiler.is_compiling() and type(x) is th.Tensor


def read_only(array: np.ndarray) -> np.ndarray:
    """Make an array read-only; a view is copied first, since it could change through its base."""
    array = array.copy() if array.base is not None else array
    array.setflags(write=False)
    return array
