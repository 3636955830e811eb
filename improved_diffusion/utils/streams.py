"""stdout and stderr that end before the program does: `| head`, a terminal that is closed, /dev/full."""

import contextlib
import os
import sys


def silence(stream):
    """
    Send what is written to stdout or stderr from here on, and what its buffer still holds, nowhere. It would fail at
    each write, and at the interpreter's end, which makes the exit status 120.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # what has no descriptor has no such buffer
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def flush():
    """Flush stdout and stderr; silence what cannot be flushed. The last thing before a process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed before Python began
                stream.flush()
        except (OSError, ValueError):
            silence(stream)


class Unfailing:
    """A stream for those who must not fail when it ends."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __eq__(self, other):  # tqdm looks for bars on the stream that text goes to
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None

    def __getattr__(self, name):
        return getattr(self._stream, name)
