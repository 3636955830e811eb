"""Describe a run in a few lines, for the start of its log."""

from collections.abc import Sequence

from .. import dist_util, logger
from ..utils.streams import counted, printable


def log_start(loop, dataset) -> None:
    """
    Log what a run trains and when it saves, and give the logger its options.

    :param loop: a TrainLoop.
    :param dataset: with num_images and class_names.
    """
    logger.get_current().writeconfig(loop.flags)
    names = dataset.class_names
    if names is not None:
        logger.log(f"classes: {describe_classes(names)}")
    last, step = loop.last_step(), loop.position.label()
    if last is not None and step >= last:
        logger.log(f"the run is at step {step} already: nothing is left to train")
    ranks = dist_util.world_size()
    parameters = sum(p.numel() for p in loop.model.parameters())
    classes = f" of {counted(len(names), 'class', 'classes')}" if names else ""
    logger.log(
        f"{counted(dataset.num_images, 'image')}{classes}, "
        f"{parameters:,} parameters, {counted(ranks, 'rank')} of {counted(loop.batch_size, 'image')} a step; training "
        f"{f'to step {last}' if last else 'until it is stopped'}; "
        f"next checkpoint: step {loop.position.next_save(loop.save_interval, last)}, then every {loop.save_interval}"
    )


def describe_classes(names: Sequence[str], only=None) -> str:
    """
    The classes with their numbers, in a line: 0 cat, 1 dog.

    :param only: the numbers of those to name.
    """
    shown = [f"{i} {printable(name)}" for i, name in enumerate(names) if only is None or i in only]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", shown[-1]])
