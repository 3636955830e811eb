"""Respacing: a diffusion process over some of the timesteps of a longer one (arXiv 2102.09672, section 4)."""

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
    Choose timesteps of a longer process.

    :param num_timesteps: length of the longer process.
    :param section_counts: one count, a list of counts or a string such as "10,15,20": the process is divided into
        equal sections, and each keeps its count of steps, evenly spaced with both ends included. "ddimN" keeps N
        steps at an integer stride, as in the DDIM paper. "nllK" keeps K steps evenly spaced and the first T // K, for
        a bound close to the whole chain's (arXiv 2102.09672). "at:0,3,17" keeps these timesteps.
    :raises InputError: (a ValueError) if a section or stride has no such steps, or explicit ones do not increase.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, _whole_number(section_counts, section_counts[len("ddim") :]))
        if section_counts.startswith("nll"):
            return _nll_timesteps(num_timesteps, _whole_number(section_counts, section_counts[len("nll") :]))
        if section_counts.startswith("at:"):
            return _explicit_timesteps(num_timesteps, section_counts)
        counts = [_whole_number(section_counts, s) for s in section_counts.split(",")]
    else:
        counts = np.atleast_1d(section_counts).tolist()
    if not counts:
        raise InputError("timestep_respacing has no sections; give step counts such as 250 or 10,15,20")
    size, longer = divmod(num_timesteps, len(counts))  # the first sections take the remainder
    steps: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (1 if i < longer else 0)
        if not 0 <= count <= length:
            section = f"section {i + 1} of {len(counts)} has {length} of the {num_timesteps} steps"
            problem = f"{section} and cannot keep {count}; give at most {length}"
            raise InputError(f"timestep_respacing {','.join(map(str, counts))}: {problem}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # a running sum, not i * stride: the timesteps of the published samples depend on its rounding
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            position += stride
        start += length
    if not steps:
        raise InputError("timestep_respacing keeps no step; give 1 or more")
    return steps


def _ddim_timesteps(num_timesteps, count):
    possible = {len(range(0, num_timesteps, stride)): stride for stride in range(num_timesteps, 0, -1)}
    if count not in possible:
        nearest = min(possible, key=lambda n: (abs(n - count), n))
        problem = f"no integer stride through {num_timesteps} steps visits {count} of them"
        raise InputError(f"timestep_respacing ddim{count}: {problem}; the nearest is ddim{nearest}")
    return set(range(0, num_timesteps, possible[count]))


def _nll_timesteps(num_timesteps, count):
    if not 1 <= count <= num_timesteps:
        raise InputError(f"timestep_respacing nll{count}: give nll1 to nll{num_timesteps}")
    return space_timesteps(num_timesteps, [count]) | set(range(num_timesteps // count))


def _explicit_timesteps(num_timesteps, text):
    steps = [_whole_number(text, word) for word in text.removeprefix("at:").split(",")]
    for before, step in zip([-1, *steps], steps, strict=False):
        if not before < step < num_timesteps:
            found = f"{before} before {step}" if 0 <= step <= before else f"{step} among {num_timesteps} timesteps"
            valid = f"increasing timesteps from 0 to {num_timesteps - 1}, such as at:0,3,17"
            raise InputError(f"timestep_respacing {text}: has {found}; give {valid}")
    return set(steps)


def _whole_number(whole, text):
    try:
        return int(text)
    except ValueError:
        valid = "step counts such as 250 or 10,15,20, ddimN such as ddim50, nllN, or timesteps such as at:0,3,17"
        raise InputError(f"timestep_respacing {whole!r}: give {valid}") from None


class SpacedDiffusion(GaussianDiffusion):
    """
    A process over some timesteps of a longer one, with the same marginals q(x_t | x_0).

    Its timesteps are 0..len(use_timesteps)-1; the model receives the longer process's, timestep_map[t].

    :param use_timesteps: timesteps of the longer process.
    :param kwargs: parameters of the longer process, as in GaussianDiffusion.
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
        return t  # _WrappedModel scales them, by the length of the longer process


def visiting(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> SpacedDiffusion:
    """
    A copy of a diffusion over some of its timesteps, of the same class.

    :param diffusion: a SpacedDiffusion, as the factories build.
    :param timesteps: for the model, strictly decreasing values of diffusion.timestep_map.
    :raises TypeError: for another GaussianDiffusion.
    :raises ValueError: if timesteps are empty, do not decrease, or are not in timestep_map.
    """
    if not isinstance(diffusion, SpacedDiffusion):
        raise TypeError("timesteps need a SpacedDiffusion; make one with use_timesteps=range(T)")
    indices = indices_of(timesteps, diffusion.timestep_map)[::-1]
    spaced = copy.copy(diffusion)
    spaced.timestep_map = [diffusion.timestep_map[i] for i in indices]
    spaced.use_timesteps = set(spaced.timestep_map)
    kinds = ("model_mean_type", "model_var_type", "loss_type", "rescale_timesteps", "min_snr_gamma")
    betas = _betas_of(diffusion.alphas_cumprod[indices])
    GaussianDiffusion.__init__(spaced, betas=betas, **{name: getattr(diffusion, name) for name in kinds})
    return spaced


def indices_of(timesteps: Sequence[int], timestep_map: Sequence[int]) -> list[int]:
    """Indices of timesteps in a timestep_map. :raises ValueError: if empty, not strictly decreasing, or not in it."""
    times = [int(t) for t in timesteps]
    if not times or times != sorted(set(times) & set(timestep_map), reverse=True):
        known = f"the diffusion's {len(timestep_map)}"
        raise ValueError(f"timesteps must decrease strictly and be among {known}, not {timesteps}")
    return [timestep_map.index(t) for t in times]


def _betas_of(alphas_cumprod):
    """Betas [T] of a process with these cumulative products."""
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class _WrappedModel:
    """Calls a model of the longer process with timesteps of the shorter one."""

    def __init__(self, model, timestep_map, rescale_timesteps, original_num_steps):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x, ts, **kwargs):
        if is_eager(ts):
            # keyed by its values, since the list may change
            timestep_map = _tensor_of(tuple(self.timestep_map), ts.dtype, ts.device)
        else:
            timestep_map = th.tensor(self.timestep_map, dtype=ts.dtype, device=ts.device)
        ts = timestep_map[ts]
        if self.rescale_timesteps:
            ts = ts.float() * (1000.0 / self.original_num_steps)
        return self.model(x, ts, **kwargs)


@functools.lru_cache(maxsize=16)
def _tensor_of(values, dtype, device):
    """Cached: one transfer to the device for all steps."""
    with th.inference_mode(False):  # else training could not use the cached tensor
        return th.tensor(values, dtype=dtype, device=device)
