"""Draw a picture of samples at each checkpoint."""

from collections.abc import Callable

import blobfile as bf
import torch as th
import torch.nn.functional as F

from .. import dist_util, logger
from ..options import TrainOptions
from ..script_util import create_diffusion
from ..solvers import default_steps
from ..utils.errors import first_line
from ..utils.streams import counted
from .arrays import to_uint8
from .generate import draw
from .pictures import grid, write_pngs

SEED = 0  # fixed: successive pictures show the same samples improve
SAMPLER, STEPS = "dpm++2m-sde", 10  # stochastic: errs less while the network is trained briefly
FILENAMES = "preview_{:06d}.png", "preview_{:06d}_model.png"  # of an average, of the newest weights


class Preview:
    """
    Draw samples by few evaluations, without the global random generators.

    :param diffusion: of all timesteps.
    :param shape: of one sample, (C, H, W).
    :param count: number of samples.
    :param conditions: keyword arguments of the model, tensors [count, ...]. Those of super-resolution, "low_res", are
                       shown on the left of their samples.
    """

    def __init__(self, diffusion, shape: tuple[int, int, int], count: int, conditions: dict[str, th.Tensor]):
        self.diffusion, self.shape, self.count, self.conditions = diffusion, shape, count, conditions

    def __call__(
        self, make_model: Callable, directory: str, step: int, weights: str = "ema",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """
        Write preview_{step}.png to a folder, preview_{step}_model.png for the newest weights, and log it. An error is
        only logged.

        :param make_model: returns the network, in eval() mode.
        :param weights: "model" for the newest, else the name of an average.
        :param stopping: returns whether the run is to stop. Between two steps of the sampler, the preview ends then.
        """

        def stop_if_wanted(*_):
            if stopping():
                raise _Stopped

        try:
            stop_if_wanted()
            steps = min(STEPS, default_steps(self.diffusion))
            cost = f"{counted(self.count, 'sample')} in {counted(steps, 'evaluation')} of {weights}"
            logger.log(f"drawing a preview of step {step}: {cost}...")
            picture = grid(self._draw(make_model(), steps, stop_if_wanted))
            name = FILENAMES[weights == "model"].format(step)
            write_pngs(directory, {name: picture})
            logger.get_current().writeimage("preview", picture, step)
            logger.log(f"drew {bf.join(directory, name)}")
        except _Stopped:
            logger.log(f"no preview of step {step}: the run stops; it is drawn when the run continues")
        except Exception as e:  # out of memory, a full disk, other conditions
            logger.warn(f"no preview of step {step}: {first_line(e)}")

    def is_missing(self, directory: str, step: int) -> bool:
        """Whether the preview of a step is missing, as after a kill."""
        return not any(bf.exists(bf.join(directory, name.format(step))) for name in FILENAMES)

    @th.inference_mode()
    def _draw(self, model, steps, callback=None):
        kwargs = {name: value.to(dist_util.dev()) for name, value in self.conditions.items()}
        settings = dict(shape=self.shape, conditions=lambda *_: kwargs, seed=SEED)
        settings |= dict(sampler=SAMPLER, sampler_options=dict(steps=steps, callback=callback))
        sample, _ = draw(self.diffusion, model, range(self.count), **settings)
        if "low_res" in kwargs:
            sample = th.cat([F.interpolate(kwargs["low_res"], self.shape[1:], mode="nearest"), sample], dim=-1)
        return to_uint8(sample).cpu().numpy()


def create_preview(
    options: TrainOptions, class_names: list[str] | None, first: Callable[[int], tuple] | None = None
) -> Preview | None:
    """
    Samples at each checkpoint, of each class in turn; None without preview_samples, and on ranks above 0.

    :param first: for super-resolution, BatchStream.first(): the samples are of the first images of the data.
    """
    count, size = options.output.preview_samples, options.model.size
    if not count or dist_util.rank() > 0:
        return None
    diffusion = create_diffusion(options.diffusion, timestep_respacing="")
    conditions = {}
    if first is not None:
        images, conditions = first(count)
        count = len(images)
    elif options.model.class_cond:
        conditions["y"] = th.arange(count) % len(class_names or range(options.model.num_classes))
    return Preview(diffusion, (options.model.image_channels, size, size), count, conditions)


class _Stopped(Exception):
    pass
