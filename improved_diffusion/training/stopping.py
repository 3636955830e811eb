"""How the ranks agree on a batch, and leave when one of them cannot continue."""

from .. import dist_util
from ..utils.errors import InputError, TrainingError, first_line


def errors_of_ranks(error):
    """
    {rank: (whether it is an InputError, its line)} of the ranks that have an error. All ranks call it.

    :param error: this rank's exception, or None.
    """
    mine = None
    if error is not None:
        is_input = isinstance(error, InputError)
        mine = is_input, str(error) if is_input else f"{type(error).__name__}: {first_line(error)}"
    return {rank: found for rank, found in enumerate(dist_util.all_gather_object(mine)) if found is not None}


def leave(error, errors):
    """
    End the run, on all ranks by the same kind of exception.

    :param error: this rank's, which is raised as it is.
    :param errors: of errors_of_ranks(); empty after a signal.
    :raises SystemExit: (status 0) without an error.
    """
    if error is not None:
        raise error
    if not errors:
        raise SystemExit(0)
    rank, (is_input, text) = min(errors.items())
    raise InputError(text) if is_input else TrainingError(f"rank {rank} cannot continue: {text}")
