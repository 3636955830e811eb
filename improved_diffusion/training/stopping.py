"""
How a run ends before its last step: it saves first, whether a signal ends it or an error.

Data fail at any time: an image cannot be read, a process that decodes is killed, memory is full.
"""

import traceback

from .. import dist_util, logger
from ..utils.errors import InputError, TrainingError, first_line, is_out_of_memory
from .resume import position, return_to


class Stoppable:
    """What TrainLoop does between two steps."""

    _position = None  # of data and random numbers before the batch of this step
    _computing = None  # within a step: whether it has changed nothing but gradients and random numbers

    def _next_batch(self, step, stop):
        """
        The batch of a step; None if that is behind the last. Here, between two steps, the ranks agree, with one message
        a step, whether to continue: if one has received a signal or gets no batch, all save and leave.
        """
        self._position = position(self.data)
        batch = error = None
        if stop.received is None and not self._ends_before(step):
            try:
                with stop.children():
                    batch = next(self.data)
            except Exception as e:
                error = e
        if dist_util.any_rank(stop.received is not None or error is not None):
            self._stop(stop.received, error)
        return batch

    def _run_step(self, batch, cond):
        """
        run_step(). If it fails, the state between two steps can be saved as long as only gradients have been computed,
        as when a GPU's memory does not suffice. An update, or code that overrides the methods, may be half done, and
        other ranks may wait in the middle of the step: then there is nothing to save.
        """
        self._computing = None
        try:
            self.run_step(batch, cond)
        except Exception as e:
            if not self._computing or dist_util.world_size() > 1 or not self._has_news():
                raise
            if is_out_of_memory(e):
                traceback.clear_frames(e.__traceback__)  # they hold activations
            self.step -= 1  # the last one that is done
            self._stop(None, e)

    def _has_news(self):
        """Whether steps have been done since the last checkpoint, or the one that the run came from."""
        return self._updates > (self._saved or (0, 0))[1] and not self._is_resumed_from_here()

    def _stop(self, signal, error):
        """
        Save what the last step left, and leave. All ranks come here together.

        :param signal: the name of one that this rank has received, or None.
        :param error: of this rank, or None.
        """
        return_to(self._position, self.data)
        errors = _errors_of_ranks(error)
        for rank, (_, text) in errors.items():
            logger.log(f"rank {rank} cannot continue: {text}")
        if self._has_news():
            self._save_once()
        reason = "an error" if errors else signal or "a signal to another rank"
        logger.log(f"stopped by {reason} at step {self._total_step}: {self._last_checkpoint or 'nothing to save'}")
        if not errors:
            raise SystemExit(0)
        if error is not None:
            raise error
        rank, (is_input, text) = min(errors.items())
        raise InputError(text) if is_input else TrainingError(f"rank {rank} cannot continue: {text}")


def _errors_of_ranks(error):
    """{rank: (whether it is an InputError, what it says)} of the ranks that have one."""
    mine = None
    if error is not None:
        is_input = isinstance(error, InputError)
        mine = is_input, str(error) if is_input else f"{type(error).__name__}: {first_line(error)}"
    return {rank: found for rank, found in enumerate(dist_util.all_gather_object(mine)) if found is not None}
