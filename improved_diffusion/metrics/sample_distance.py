"""Distances between samples and a reference during training: whether samples still improve, in progress.csv."""

from collections.abc import Callable

import numpy as np
import torch as th

from .. import dist_util, logger
from ..inference.arrays import to_uint8
from ..inference.generate import draw
from ..inference.preview import SAMPLER
from ..options import TrainOptions
from ..script_util import create_diffusion
from ..solvers import default_steps
from ..training.checkpoints import rng_state, set_rng_state
from ..utils.errors import InputError
from ..utils.streams import counted
from .evaluation import Statistics, distances, gather, network_of, statistics_of
from .features import FEATURES, FeatureNetwork
from .image_sets import ImageSet

SEED = 0  # fixed: distances of different steps have the same noise
STEPS = 20  # evaluations of the network per sample
BATCH_SIZE = 16  # without gradients: a step of one image needs more memory
SUBSETS = 10  # of KID


class SampleDistance:
    """
    Draws samples that depend on the network alone, neither on ranks nor resuming, and compares their features.

    :param diffusion: of all timesteps.
    :param shape: of a sample, (C, H, W).
    :param count: number of samples over all ranks.
    :param num_classes: of a class-conditional model, which has the same number of samples of each; 0 without.
    :param reference: of images of the samples' shape, by this network.
    """

    def __init__(
        self, diffusion, shape: tuple[int, int, int], count: int, num_classes: int, reference: Statistics,
        network: FeatureNetwork,
    ):  # fmt: skip
        self.diffusion, self.shape, self.count, self.num_classes = diffusion, shape, count, num_classes
        self.reference, self.network = reference, network

    @th.inference_mode()
    def __call__(self, model: th.nn.Module, average: Callable, stopped: Callable[[], bool]) -> dict[str, float]:
        """
        A measure of TrainLoop, of its first average. Leaves random numbers and the network as they are.

        :param average: returns the network to draw samples of, a copy, in eval() mode.
        :param stopped: whether to stop, the same on all ranks; called before each batch.
        :return: {"FD-lite0": distance, "KID-lite0": distance}, or FID and KID; {} if stopped, or if samples are not
                 finite.
        """
        if stopped():
            return {}
        logger.log(f"evaluating {counted(self.count, 'sample')}...")
        rng = rng_state()
        try:
            outputs = self._draw(average(), stopped)
        finally:
            set_rng_state(rng)
        if outputs is None:
            return {}
        samples = Statistics(self.network.name, self.count, self.reference.shape, *gather(outputs, self.count))
        found = dist_util.broadcast_from_rank_0(distances, samples, self.reference, SUBSETS)
        return {name: value for name, value in found.items() if not name.endswith(" std")}

    def _draw(self, model, stopped):
        """Batches of (numbers, outputs of the feature network) of this rank's samples; None if there are not all."""
        outputs, rank, world = [], dist_util.rank(), dist_util.world_size()
        settings = dict(shape=self.shape, conditions=self._conditions, seed=SEED)
        settings |= dict(sampler=SAMPLER, sampler_options={"steps": min(STEPS, default_steps(self.diffusion))})
        for first in range(0, self.count, BATCH_SIZE * world):
            if stopped():
                return None
            numbers = range(first + rank, min(first + BATCH_SIZE * world, self.count), world)
            x, _ = draw(self.diffusion, model, numbers, **settings)
            if dist_util.any_rank(not x.isfinite().all()):
                logger.warn("samples are not finite: they have no distance to the reference")
                return None
            if len(numbers):
                outputs.append((np.array(numbers), self.network(to_uint8(x))))
        return outputs

    def _conditions(self, numbers, _):
        return {"y": th.tensor(numbers, device=dist_util.dev()) % self.num_classes} if self.num_classes else {}


def create_sample_distance(options: TrainOptions, class_names: list[str] | None) -> SampleDistance | None:
    """
    The SampleDistance of a training run; None without eval_samples. Reads the reference; a collective.

    :raises InputError: if the reference cannot be read, has images of another size, or statistics of a function of the
                        user's own.
    """
    output, model = options.output, options.model
    if not output.eval_samples:
        return None
    reference = ImageSet(output.eval_reference, num_workers=0)
    reference.scale_to((model.image_size, model.image_size, model.image_channels))
    name = "lite0" if reference.has_images else network_of(reference)
    if name not in FEATURES:
        problem = f"has statistics of features {name}"
        raise InputError(f"{output.eval_reference}: {problem}; give images, or statistics of {' or '.join(FEATURES)}")
    found = "statistics" if not reference.has_images else f"{reference.count:,} images"
    logger.note(f"samples evaluated at each checkpoint: {output.eval_samples}, against {found} by features {name}")
    diffusion = create_diffusion(options.diffusion, timestep_respacing="")
    shape = (model.image_channels, model.image_size, model.image_size)
    num_classes = len(class_names or ()) if model.class_cond else 0
    network, rng = FeatureNetwork(name), rng_state()
    try:
        statistics = statistics_of(reference, network)
    finally:
        set_rng_state(rng)
    return SampleDistance(diffusion, shape, output.eval_samples, num_classes, statistics, network)
