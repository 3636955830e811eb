"""The training loop of a run, from its options."""

from collections.abc import Callable, Iterable
from typing import Any

from .. import dist_util
from ..options import TrainOptions
from ..resample import create_named_schedule_sampler
from ..train_util import TrainLoop
from .pack_first import loading_advice


def create_loop(
    options: TrainOptions, model: Any, diffusion: Any, data: Any, checkpoint: Any, preview: Callable | None,
    measures: Iterable[Callable | None],
) -> TrainLoop:  # fmt: skip
    """
    :param checkpoint: to continue from, as from open_checkpoint().
    :param preview, measures: see TrainLoop; a measure that is None is left out.
    """
    return options.call(
        TrainLoop,
        model=model.to(dist_util.dev()),
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(options.training.schedule_sampler, diffusion),
        resume_checkpoint=checkpoint,
        flags=options.of_the_run(),
        preview=preview,
        loading_advice=loading_advice(options),
        measures=[measure for measure in measures if measure],
    )
