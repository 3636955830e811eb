"""Progress: a bar on a terminal; without one, a line a minute."""

import sys
import time

from .streams import Unfailing

SECONDS_BETWEEN_LINES = 60


class Progress:
    """
    :param what: for "sampling: 120 of 4000 steps".
    :param total: units in all, None for no end.
    :param unit: what is counted, in the plural.
    :param say: takes the lines; None for no lines.
    :param done: units done before.
    :param show: False shows nothing: for ranks other than 0.
    """

    def __init__(self, what, total, unit, say, done=0, show=True):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._rated = self._start, done
        self._bar, self._say = None, say if show else None
        if show and sys.stderr is not None and sys.stderr.isatty():
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
        """Count n more units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if self._bar is None and self._say and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(f"{self.what}: {self.done} of {self.total} {self.unit}, {self._left(now)} left")

    def reach(self, done):
        """Count up to `done` units in all."""
        if done > self.done:
            self.update(done - self.done)

    def rate(self):
        """Units a second since the last call."""
        now = time.monotonic()
        then, done = self._rated
        self._rated = now, self.done
        return (self.done - done) / max(now - then, 1e-9)

    def show(self, **values):
        """Numbers beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def _left(self, now):
        seconds = (now - self._start) / (self.done - self._first) * (self.total - self.done)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

    def close(self):
        if self._bar is not None:
            self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def counting_calls(model, progress):
    """A function that calls the model and counts each call as one unit of progress."""

    def call(*args, **kwargs):
        out = model(*args, **kwargs)
        progress.update()
        return out

    return call
