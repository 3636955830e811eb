"""The loss and the bound of held-out images during training: overfitting shows as their rise."""

import copy
from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils.data import default_collate

from .. import dist_util, logger
from ..image_datasets import load_data_once
from ..inference.generate import SampleNoise
from ..options import TrainOptions
from ..script_util import create_diffusion
from ..training.checkpoints import rng_state, set_rng_state
from ..utils.errors import InputError
from ..utils.files import is_inside
from ..utils.streams import counted
from .image_sets import evenly

MAX_IMAGES = 64
LOSS_TIMESTEPS = 4  # per image
BOUND_TIMESTEPS = 20  # of the chain whose bound is evaluated
BATCH_SIZE = 8  # without gradients: a step of one image needs more memory
SEED = 0
GOLDEN = (5**0.5 - 1) / 2  # the fractions of its multiples spread evenly over [0, 1)


class Validation:
    """
    Evaluates a network on fixed images with fixed timesteps and noise, which neither ranks nor resuming change, so that
    the values of different steps compare.

    :param diffusion: the run's: of its training_losses(), LOSS_TIMESTEPS an image.
    :param chain: a few timesteps of the same process: of its calc_bpd_loop().
    :param images: {number: (x_start [C, H, W], conditions)} of this rank's share; numbers are unique over the ranks.
    :param add_conditions: maps a batch to further conditions.
    """

    def __init__(self, diffusion, chain, images: dict[int, tuple], add_conditions: Callable | None = None):
        self.diffusion, self.chain = diffusion, chain
        numbers = list(images)
        self.batches: list[tuple[list[int], th.Tensor, dict[str, th.Tensor]]] = []
        for start in range(0, len(numbers), BATCH_SIZE):
            mine = numbers[start : start + BATCH_SIZE]
            x_start, cond = default_collate([images[number] for number in mine])
            self.batches.append((mine, x_start, {**cond, **(add_conditions(x_start) if add_conditions else {})}))
        self._rounds = max(dist_util.all_gather_object(len(self.batches)))
        self._count = sum(dist_util.all_gather_object(len(numbers)))

    @th.no_grad()
    def __call__(self, model: th.nn.Module, average: Callable, stopped: Callable[[], bool]) -> dict[str, float]:
        """
        A measure of TrainLoop, of the newest weights. Leaves random numbers and the network as they are.

        :param model: the network, on dist_util.dev(); evaluated in eval() mode, without torch.compile.
        :param stopped: whether to stop, the same on all ranks; called before each batch.
        :return: {"valid_loss": mean loss, "valid_bpd": mean bound, bits per dimension}; {} if stopped.
        """
        logger.log(f"evaluating {counted(self._count, 'held-out image')}...")
        rng, modes = rng_state(), [(module, module.training) for module in model.modules()]
        model = copy.copy(model)  # shares all but the compiled call: compiling for these batches takes minutes
        model.eval()
        try:
            found: list[tuple[int, float, float]] = []
            for i in range(self._rounds):
                if stopped():
                    return {}
                if i < len(self.batches):
                    found += self._evaluate(model, *self.batches[i])
        finally:
            set_rng_state(rng)
            for module, training in modes:
                module.training = training
        of_all = sorted(row for rows in dist_util.all_gather_object(found) for row in rows)
        _, losses, bounds = zip(*of_all, strict=True)
        return {"valid_loss": sum(losses) / len(losses), "valid_bpd": sum(bounds) / len(bounds)}

    def _evaluate(self, model, numbers, x_start, cond):
        """:return: (number, loss, bound) of each image."""
        x_start = x_start.to(dist_util.dev())
        kwargs: dict[str, Any] = {"model_kwargs": {k: v.to(dist_util.dev()) for k, v in cond.items()}}
        noise_fn = SampleNoise(SEED, numbers)
        bounds = self.chain.calc_bpd_loop(model, x_start, noise_fn=noise_fn, **kwargs)["total_bpd"]
        noise_fn, losses = SampleNoise(SEED, numbers), th.zeros(len(x_start), dtype=th.float64, device=x_start.device)
        for draw in range(LOSS_TIMESTEPS):
            t = th.tensor([self.timestep(number, draw) for number in numbers], device=x_start.device)
            terms = self.diffusion.training_losses(model, x_start, t, noise=noise_fn(x_start), **kwargs)
            losses += terms["loss"] / LOSS_TIMESTEPS
        return list(zip(numbers, losses.tolist(), bounds.tolist(), strict=True))

    def timestep(self, number: int, draw: int) -> int:
        """The timestep of the loss of an image: over all images and draws evenly spread."""
        return int(self.diffusion.num_timesteps * ((number * LOSS_TIMESTEPS + draw + 0.5) * GOLDEN % 1))


def create_validation(
    options: TrainOptions, diffusion, class_names: list[str] | None, add_conditions: Callable | None = None
) -> Validation | None:
    """
    The Validation of a training run; None without valid_dir. A collective.

    :param class_names: those of the training data.
    :raises InputError: if the images cannot be read, are of other classes, or are training images.
    """
    valid_dir, world = options.training.valid_dir, dist_util.world_size()
    if not valid_dir:
        return None
    data_dir = options.data.data_dir
    if data_dir and (is_inside(valid_dir, data_dir) or is_inside(data_dir, valid_dir)):
        raise InputError(f"valid_dir {valid_dir}: has images that data_dir {data_dir} has too; give a folder beside it")
    arguments = dict(data_dir=valid_dir, image_size=options.model.size, class_names=class_names)
    loader = options.call(load_data_once, **arguments, batch_size=BATCH_SIZE, num_workers=0)
    dataset = loader.dataset  # images number rank, rank + world, ... of the folder
    chosen = evenly(MAX_IMAGES, dataset.num_images).tolist()  # of all classes
    count = f"{len(chosen)} of {dataset.num_images:,}"
    logger.note(f"held-out images, evaluated at each checkpoint: {count} in {valid_dir}")
    images = {number: dataset[i // world] for number, i in enumerate(chosen) if i % world == dist_util.rank()}
    timesteps = str(min(BOUND_TIMESTEPS, options.diffusion.diffusion_steps))
    chain = create_diffusion(options.diffusion, timestep_respacing=timesteps)
    return Validation(diffusion, chain, images, add_conditions)
