"""Draw a picture of samples at each checkpoint."""

from collections.abc import Callable

import blobfile as bf
import torch as th

from .. import dist_util, logger
from ..samplers import SAMPLERS
from ..solvers import default_steps
from ..utils.errors import first_line
from .arrays import to_uint8
from .generate import SampleNoise
from .pictures import grid, write_pngs

SEED = 0  # fixed: successive pictures show the same samples improve
SAMPLER, STEPS = "dpm++2m-sde", 10  # stochastic: errs less while the network is trained briefly
FILENAME = "preview_{:06d}.png"


class Preview:
    """
    Draw samples by few evaluations, without the global random generators.

    :param diffusion: of all timesteps.
    :param shape: of one sample, (C, H, W).
    :param count: number of samples.
    :param conditions: keyword arguments of the model, tensors [count, ...].
    """

    def __init__(self, diffusion, shape: tuple[int, int, int], count: int, conditions: dict[str, th.Tensor]):
        self.diffusion, self.shape, self.count, self.conditions = diffusion, shape, count, conditions

    def __call__(self, make_model: Callable, directory: str, step: int) -> None:
        """
        Write preview_{step}.png to a folder, and log it. An error is only logged.

        :param make_model: returns the network, in eval() mode.
        """
        try:
            picture = grid(self._draw(make_model()))
            name = FILENAME.format(step)
            write_pngs(directory, {name: picture})
            logger.get_current().writeimage("preview", picture, step)
            logger.log(f"drew {bf.join(directory, name)}")
        except Exception as e:  # out of memory, a full disk, other conditions
            logger.warn(f"no preview of step {step}: {first_line(e)}")

    def is_missing(self, directory: str, step: int) -> bool:
        """Whether the preview of a step is missing, as after a kill."""
        return not bf.exists(bf.join(directory, FILENAME.format(step)))

    @th.inference_mode()
    def _draw(self, model):
        device, noise_fn = dist_util.dev(), SampleNoise(SEED, range(self.count))
        x_T = noise_fn(th.empty(self.count, *self.shape, device=device))
        kwargs = {name: value.to(device) for name, value in self.conditions.items()}
        steps = min(STEPS, default_steps(self.diffusion))
        sample = SAMPLERS[SAMPLER](self.diffusion, model, x_T, model_kwargs=kwargs, noise_fn=noise_fn, steps=steps)
        return to_uint8(sample).cpu().numpy()
