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
