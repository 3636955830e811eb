"""How far something is: a bar on a terminal; where there is none, a line of the log now and then."""

import sys
import time

from .. import dist_util, logger
from .streams import Unfailing

SECONDS_BETWEEN_LINES = 60


class Progress:
    """
    Of rank 0; the others say nothing.

    :param what: is done, for "sampling: 120 of 4,000 steps".
    :param total: units in all, None for no end.
    :param unit: of what is counted, in the plural.
    :param done: units that had been done before.
    :param lines: whether there are lines where there is no terminal.
    :param say: takes such a line; the logger's log() if None.
    """

    def __init__(self, what, total, unit, done=0, lines=True, say=None):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._begun, self._first = time.monotonic(), done
        self._said = self._begun
        self._rated = self._begun, done
        self._bar, self._lines, self._say = None, lines and dist_util.rank() == 0, say or logger.log
        if dist_util.rank() == 0 and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=what,
                total=total,
                unit=f" {unit}",
                initial=done,
                dynamic_ncols=True,
                smoothing=0.1,
                file=Unfailing(sys.stderr),  # a terminal may be closed while the run continues
            )

    def update(self, n=1):
        """n more units are done."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if self._bar is None and self._lines and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(f"{self.what}: {self.done} of {self.total} {self.unit}, {self._left(now)} left")

    def reach(self, done):
        """`done` units are done in all."""
        if done > self.done:
            self.update(done - self.done)

    def rate(self):
        """Units a second since this was last asked."""
        now = time.monotonic()
        then, done = self._rated
        self._rated = now, self.done
        return (self.done - done) / max(now - then, 1e-9)

    def show(self, **values):
        """Numbers beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def _left(self, now):
        seconds = (now - self._begun) / (self.done - self._first) * (self.total - self.done)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    def close(self):
        if self._bar is not None:
            self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def counting_calls(model, progress):
    """The model as a function whose every call is one unit of progress."""

    def call(*args, **kwargs):
        out = model(*args, **kwargs)
        progress.update()
        return out

    return call
