"""A diffusion process with fewer steps, cut out of a longer one (the paper, section 4)."""

import copy
import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch as th

from .gaussian_diffusion import GaussianDiffusion, Model
from .schedules import is_eager
from .utils.errors import InputError


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """
    Choose the timesteps of a longer process that a shorter one keeps.

    :param num_timesteps: steps of the longer process.
    :param section_counts: a list of counts, a string of them with commas, or one count: the process is
        cut into that many sections of equal length, and each keeps its count of steps, evenly spread
        with both its ends. "ddimN" keeps N steps at a whole-number stride, as the DDIM paper does.
    :return: a set of timesteps.
    :raises InputError: (a ValueError) if there are no such N steps.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, _whole_number(section_counts, section_counts[len("ddim") :]))
        counts = [_whole_number(section_counts, s) for s in section_counts.split(",")]
    else:
        counts = np.atleast_1d(section_counts).tolist()
    if not counts:
        raise InputError("timestep_respacing has no sections; give step counts such as 250 or 10,15,20")
    size, longer = divmod(num_timesteps, len(counts))  # the first sections take what is left over
    steps: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (1 if i < longer else 0)
        if not 0 <= count <= length:
            raise InputError(
                f"timestep_respacing {','.join(map(str, counts))}: section {i + 1} of "
                f"{len(counts)} is {length} of the {num_timesteps} steps long and cannot keep {count}; "
                f"give at most {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # a running sum, rounded: the positions published models were sampled at depend on it
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            position += stride
        start += length
    if not steps:
        raise InputError("timestep_respacing keeps no step at all; give 1 or more")
    return steps


def _ddim_timesteps(num_timesteps, count):
    possible = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if count not in possible:
        nearest = min(possible, key=lambda n: (abs(n - count), n))
        raise InputError(
            f"timestep_respacing ddim{count}: no whole-number stride through {num_timesteps} steps visits "
            f"{count} of them; the nearest that works is ddim{nearest}"
        )
    return set(range(0, num_timesteps, possible[count]))


def _whole_number(whole, text):
    try:
        return int(text)
    except ValueError:
        raise InputError(
            f"timestep_respacing {whole!r}: give step counts such as 250 or 10,15,20, or ddimN such as ddim50"
        ) from None


class SpacedDiffusion(GaussianDiffusion):
    """
    The process that visits only some timesteps of a longer one, with the same marginals there.

    Its own timesteps are 0..len(use_timesteps)-1; the model still sees the longer process's, by timestep_map.

    :param use_timesteps: timesteps of the longer process to keep.
    :param kwargs: parameters of the longer process's GaussianDiffusion.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs):
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        self.timestep_map = sorted(t for t in self.use_timesteps if 0 <= t < self.original_num_steps)
        alphas_cumprod = GaussianDiffusion(**kwargs).alphas_cumprod[self.timestep_map]
        super().__init__(**{**kwargs, "betas": _betas_of(alphas_cumprod)})

    def p_mean_variance(self, model: Model, *args, **kwargs) -> dict[str, th.Tensor]:
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model: Model, *args, **kwargs) -> dict[str, th.Tensor]:
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def _wrap_model(self, model):
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)

    def _scale_timesteps(self, t):
        return t  # the wrapped model scales, by the longer process's length


def visiting(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> SpacedDiffusion:
    """
    A copy of a diffusion that visits only some of its timesteps, with the same marginals there.

    :param diffusion: a SpacedDiffusion, as the factories build. Methods that its class overrides stay.
    :param timesteps: strictly decreasing, out of diffusion.timestep_map: those that the model is called with.
    :raises TypeError: for a GaussianDiffusion that is no SpacedDiffusion.
    :raises ValueError: if there are no timesteps, they do not decrease, or are not the diffusion's.
    """
    if not isinstance(diffusion, SpacedDiffusion):
        raise TypeError("timesteps need a SpacedDiffusion; make one with use_timesteps=range(T)")
    kept, visited = list(diffusion.timestep_map), [int(t) for t in timesteps][::-1]
    if not visited or visited != sorted(set(visited) & set(kept)):
        raise ValueError(f"timesteps must decrease strictly and be among the diffusion's {len(kept)}, not {timesteps}")
    alphas_cumprod = diffusion.alphas_cumprod[[kept.index(t) for t in visited]]
    spaced = copy.copy(diffusion)
    spaced.use_timesteps, spaced.timestep_map = set(visited), visited
    GaussianDiffusion.__init__(
        spaced,
        betas=_betas_of(alphas_cumprod),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
    )
    return spaced


def _betas_of(alphas_cumprod):
    """The beta between each two steps, from the products of alpha at both."""
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class _WrappedModel:
    """A model of the longer process, called with timesteps of the shorter one."""

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x, ts, **kwargs):
        if is_eager(ts):
            timestep_map = _tensor_of(
                tuple(self.timestep_map), ts.dtype, ts.device
            )  # by its values: the list may change
        else:
            timestep_map = th.tensor(self.timestep_map, dtype=ts.dtype, device=ts.device)
        ts = timestep_map[ts]
        if self.rescale_timesteps:
            ts = ts.float() * (1000.0 / self.original_num_steps)
        return self.model(x, ts, **kwargs)


@functools.lru_cache(maxsize=16)
def _tensor_of(values, dtype, device):
    """One transfer to the device for all steps."""
    with th.inference_mode(False):  # training may use it later
        return th.tensor(values, dtype=dtype, device=device)
