"""A picture of samples at each checkpoint."""

import blobfile as bf
import torch as th

from .. import dist_util, logger
from ..samplers import SAMPLERS
from ..utils.errors import first_line
from .arrays import to_uint8
from .generate import SampleNoise
from .pictures import grid, write_pngs

SEED = 0  # fixed: successive pictures show the same samples as they become better
STEPS = 20  # of DDIM


def _filename(step):
    return f"preview_{step:06d}.png"


class Preview:
    """
    Draws samples by DDIM, without touching the global random generators.

    :param diffusion: of STEPS timesteps or fewer.
    :param shape: of one sample, (C, H, W).
    :param count: number of samples.
    :param conditions: keyword arguments of the model, tensors [count, ...].
    """

    def __init__(self, diffusion, shape, count, conditions):
        self.diffusion, self.shape, self.count, self.conditions = diffusion, shape, count, conditions

    def __call__(self, make_model, directory, step):
        """
        Write preview_{step}.png to a folder, and log it. Errors are logged too: they end no run.

        :param make_model: returns the network, in eval() mode.
        """
        try:
            picture = grid(self._draw(make_model()))
            name = _filename(step)
            write_pngs(directory, {name: picture})
            logger.get_current().writeimage("preview", picture, step)
            logger.log(f"drew {bf.join(directory, name)}")
        except Exception as e:  # a full GPU, a full disk, a model that wants other conditions
            logger.warn(f"no preview of step {step}: {first_line(e)}")

    def is_missing(self, directory, step):
        """Whether the preview of a step was not drawn, since the run was killed before."""
        return not bf.exists(bf.join(directory, _filename(step)))

    @th.inference_mode()
    def _draw(self, model):
        device, noise_fn = dist_util.dev(), SampleNoise(SEED, range(self.count))
        x_T = noise_fn(th.empty(self.count, *self.shape, device=device))
        kwargs = {name: value.to(device) for name, value in self.conditions.items()}
        sample = SAMPLERS["ddim"](self.diffusion, model, x_T, model_kwargs=kwargs, noise_fn=noise_fn)
        return to_uint8(sample).cpu().numpy()
