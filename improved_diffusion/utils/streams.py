"""Text for a terminal; stdout and stderr that close before the program ends: `| head`, a closed terminal, /dev/full."""

import contextlib
import os
import re
import select
import sys

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CONTROL_IN_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # without tab and newline


def printable(text: str, lines: bool = False) -> str:
    """
    Escape control characters, as in names of files: they could end a line or change the terminal.

    :param lines: the text has several lines; newlines and tabs stay.
    """
    return (CONTROL_IN_LINES if lines else CONTROL).sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def counted(n: int, singular: str, plural: str = "") -> str:
    """A number and its noun: 1 image, 2,000 images."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def show(text: str, error: bool = False) -> None:
    """Print a line, or several, to stdout or stderr. Nothing happens if that is closed."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed before Python started
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = f"{text}\n".encode(encoding, "backslashreplace").decode(encoding)  # names of files may be of any bytes
    try:
        stream.write(text)  # one write: other ranks write to the same terminal
        stream.flush()
    except (OSError, ValueError):
        silence(stream)


def show_at_once(text: str) -> None:
    """
    Print a line to stdout without waiting, from any thread: another one may be writing. Nothing happens if stdout is
    closed or nobody reads it.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stdout, or no descriptor
        fd = sys.stdout.fileno()
        if os.name != "posix" or select.select([], [fd], [], 0)[1]:
            below = "\n" if os.isatty(fd) else ""  # a progress bar and the terminal's ^C
            os.write(fd, f"{below}{text}\n".encode())


def reserve() -> None:
    """
    Open /dev/null as stdin, stdout and stderr where they are closed. Otherwise the next file gets their number, and
    with it what libraries write to stderr.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


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
