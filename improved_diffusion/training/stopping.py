"""Stop a run early, after a signal or an error on one of its ranks."""

from .. import dist_util, logger
from ..utils.errors import InputError, TrainingError, first_line


class StoppedBySignal(SystemExit):
    """The end of a run, with status 0. :param signal: its name; None if another rank has received it."""

    def __init__(self, signal: str | None):
        super().__init__(0)
        self.signal = signal


def try_next(data, stop):
    """
    The next batch, or the exception that prevents it: an unreadable image, a killed worker, full memory.

    :param stop: StopSignals; workers' signals are handled in here only.
    :return: (batch or None, exception or None).
    """
    try:
        with stop.children():
            return next(data), None
    except Exception as e:
        return None, e


def stop_run(signal, error, save):
    """
    Save and leave. All ranks call it.

    :param signal: name of the one that this rank has received, or None.
    :param error: of this rank, or None.
    :param save: saves if there are unsaved steps; returns the step and the last checkpoint, for the log.
    :raises StoppedBySignal: after a signal; otherwise the error, or on other ranks one of the same kind.
    """
    mine = None
    if error is not None:
        is_input = isinstance(error, InputError)
        mine = is_input, str(error) if is_input else f"{type(error).__name__}: {first_line(error)}"
    errors = {rank: found for rank, found in enumerate(dist_util.all_gather_object(mine)) if found is not None}
    for rank, (_, text) in errors.items():
        logger.log(f"rank {rank} cannot continue: {text}")
    where = save()
    logger.log(f"stopped by {'an error' if errors else signal or 'a signal to another rank'} {where}")
    if error is not None:
        raise error
    if not errors:
        raise StoppedBySignal(signal)
    rank, (is_input, text) = min(errors.items())
    raise InputError(text) if is_input else TrainingError(f"rank {rank} cannot continue: {text}")
