"""Whether a run waits for its data."""

import contextlib
import time

MUCH = 0.3  # share of the time
STEPS, SECONDS = 20, 10.0  # at least, to judge


class Waiting:
    """The share of a run's time that its steps wait for data. No step waits for the GPU to measure it."""

    def __init__(self):
        self._start = None  # of the interval: the first batch waits for the start of the workers

    @contextlib.contextmanager
    def for_data(self):
        """The block waits for the data of one step."""
        start = time.monotonic()
        yield
        now = time.monotonic()
        if self._start is None:
            self._begin(now)
        else:
            self._waited += now - start
            self._steps += 1

    def is_much(self) -> float:
        """The share since the last answer if it is MUCH; else, or before STEPS and SECONDS, 0."""
        now = time.monotonic()
        if self._start is None or self._steps < STEPS or now - self._start < SECONDS:
            return 0.0
        share = self._waited / (now - self._start)
        self._begin(now)
        return share if share >= MUCH else 0.0

    def _begin(self, now):
        self._start, self._waited, self._steps = now, 0.0, 0
