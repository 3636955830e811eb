"""A training run, from what a script has built."""

from collections.abc import Callable, Iterable
from typing import Any

from .. import dist_util, logger
from ..options import TrainOptions
from ..resample import create_named_schedule_sampler
from ..train_util import TrainLoop, get_blob_logdir
from ..training.describe import log_start
from ..training.resume import open_checkpoint
from ..utils.log_formats import KVWriter
from .advice import loading_advice
from .estimate import memory_warnings
from .parser import logging_to
from .run_config import Run, save_config
from .run_folder import claim_folder


def train_run(
    run: Run[TrainOptions], create: Callable, model: Any, diffusion: Any, data: Any, preview: Callable | None,
    measures: Iterable[Callable | None] = (), *, outputs: Iterable[KVWriter] = (), spell: Callable[[str], str] = str,
) -> None:  # fmt: skip
    """
    Take the folder of a run, and train there until the last step or a signal.

    :param create: the factory of model and diffusion.
    :param data: as from load_data().
    :param preview, measures: see TrainLoop; a measure that is None is left out.
    :param outputs: further ones of the logger.
    :param spell: rewrites the lines that name flags, for callers that have options instead.
    :raises InputError: if the folder is of another run, or the checkpoint to continue from does not fit.
    """
    options, names = run.options, data.dataset.class_names
    checkpoint = options.call(open_checkpoint, model=model)
    notes = [*run.notes, *memory_warnings(options, create)]
    with logging_to(options.general.log_dir, notes, claim_folder(checkpoint, options.general.overwrite), spell):
        logger.get_current().output_formats += outputs
        loop = options.call(
            TrainLoop,
            model=model.to(dist_util.dev()),
            diffusion=diffusion,
            data=data,
            schedule_sampler=create_named_schedule_sampler(options.training.schedule_sampler, diffusion),
            resume_checkpoint=checkpoint,
            flags=options.of_the_run(),
            preview=preview,
            loading_advice=spell(loading_advice(options)),
            measures=[measure for measure in measures if measure],
        )
        save_config(get_blob_logdir(), options.script, options, names)
        log_start(loop, data.dataset)
        loop.draw_missing_preview()
        loop.run_loop()
