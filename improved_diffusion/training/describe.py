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
    done = last is not None and step >= last
    ranks = dist_util.world_size()
    parameters = sum(p.numel() for p in loop.model.parameters())
    classes = f" of {counted(len(names), 'class', 'classes')}" if names else ""
    task = f"training {f'to step {last}' if last else 'until it is stopped'}; next checkpoint: step "
    task += f"{loop.position.next_save(loop.save_interval, last)}, then every {loop.save_interval}"
    logger.log(
        f"{counted(dataset.num_images, 'image')}{classes}, "
        f"{parameters:,} parameters, {counted(ranks, 'rank')} of {counted(loop.batch_size, 'image')} a step; "
        + (f"the run is at step {step} already: nothing is left to train" if done else task)
    )


def describe_classes(names: Sequence[str], only=None) -> str:
    """
    The classes with their numbers, in a line: 0 cat, 1 dog.

    :param only: the numbers of those to name.
    """
    if only is None and len(names) > 1 and list(names) == list(map(str, range(len(names)))):
        return f"0 to {len(names) - 1}"
    shown = [f"{i} {printable(name)}" for i, name in enumerate(names) if only is None or i in only]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", shown[-1]])
