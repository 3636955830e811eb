"""A picture of what a model draws, each time training saves it."""

import blobfile as bf
import torch as th

from .. import dist_util, logger
from ..utils.errors import first_line
from .generate import SampleNoise, to_uint8
from .pictures import grid, write_pngs

SEED = 0  # always the same noise: successive pictures show the same samples as they become better
STEPS = 20  # of DDIM


def _filename(step):
    return f"preview_{step:06d}.png"


class Preview:
    """
    Draws samples in a few steps of DDIM, without touching the global random generators.

    :param diffusion: a GaussianDiffusion of STEPS timesteps or fewer.
    :param shape: of one sample, (C, H, W).
    :param count: of samples.
    :param conditions: keyword arguments of the model, tensors [count, ...].
    """

    def __init__(self, diffusion, shape, count, conditions):
        self.diffusion, self.shape, self.count, self.conditions = diffusion, shape, count, conditions

    def __call__(self, make_model, directory, step):
        """
        Write preview_{step}.png to a folder, and give it to the logger. What goes wrong is logged: no run ends by it.

        :param make_model: gives the network to draw from, in eval() mode.
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
        device = dist_util.dev()
        sample = self.diffusion.ddim_sample_loop(
            model,
            (self.count, *self.shape),
            model_kwargs={name: value.to(device) for name, value in self.conditions.items()},
            device=device,
            noise_fn=SampleNoise(SEED, range(self.count)),
        )
        return to_uint8(sample).cpu().numpy()
