"""Progress: a bar on a terminal, otherwise a line per minute."""

import sys
import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 60


class Progress:
    """
    Count units of work, and show them.

    :param what: the work, as in "sampling: 120 of 4000 steps".
    :param total: number of units; None if unknown.
    :param unit: name of the units, plural.
    :param say: prints a line; None for no lines. Without a total there are none.
    :param done: units done before.
    :param show: False on ranks other than 0: show nothing.
    """

    def __init__(self, what: str, total: int | None, unit: str, say: Callable | None, done: int = 0, show: bool = True):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._start = self._last_line = time.monotonic()
        self._first = done
        self._rated = self._start, done  # time and units at the last rate()
        self._bar, self._say = None, say if show else None
        if show and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            look = dict(dynamic_ncols=True, smoothing=0.1)
            self._bar = tqdm(desc=what, total=total, unit=f" {unit}", initial=done, **look)

    def update(self, n: int = 1) -> None:
        """Count n more units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        now = time.monotonic()
        if self._bar is None and self._say and self.total and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(f"{self.what}: {self.done} of {self.total} {self.unit}, {self.left()} left")

    def left(self) -> str:
        """The time that the rest takes at the rate so far, in words; "" if that is unknown."""
        if not self.total or self.done <= self._first:
            return ""
        return duration((time.monotonic() - self._start) / (self.done - self._first) * (self.total - self.done))

    def reach(self, done: int) -> None:
        """Set the count to `done`, unless it is higher."""
        if done > self.done:
            self.update(done - self.done)

    def rate(self) -> float:
        """Units per second since the last call."""
        now = time.monotonic()
        then, done = self._rated
        self._rated = now, self.done
        return (self.done - done) / max(now - then, 1e-9)

    def show(self, **values: float) -> None:
        """Show numbers after the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A length of time in one unit: 72 s, 2 min, 21 h, 4 days."""
    for unit, size, below in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < below * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"


def count_calls(model: Callable, progress: Progress) -> Callable:
    """Wrap a model so that each call counts as one unit of progress."""

    def call(*args, **kwargs):
        out = model(*args, **kwargs)
        progress.update()
        return out

    return call
