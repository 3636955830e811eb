"""stdout and stderr that close before the program ends: `| head`, a closed terminal, /dev/full."""

import contextlib
import os
import sys


def silence(stream) -> None:
    """
    Redirect stdout or stderr to /dev/null, with what its buffer holds. Otherwise each write fails, and the flush at the
    interpreter's exit makes the exit status 120.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no descriptor: no such flush either
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def flush() -> None:
    """Flush stdout and stderr before the process exits; silence one that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed before Python started
                stream.flush()
        except (OSError, ValueError):
            silence(stream)


class BestEffortStream:
    """A stream that ignores failing writes."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __eq__(self, other):  # tqdm searches for bars on the same stream
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name):
        return getattr(self._stream, name)
