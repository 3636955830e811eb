"""
Files and folders, on a local disk or at a URL that blobfile knows.

What is written is whole or absent, whenever a crash or a full disk comes.
"""

import contextlib
import io
import os

import blobfile as bf

from .errors import InputError, first_line, is_loss_of_a_worker

TEMPORARY = ".tmp"  # ends the name of a file until it is whole


def is_remote(path):
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in path


def list_folder(directory):
    """The names in a folder, in no order."""
    # blobfile would look at every local file, and fail at a broken link
    return bf.listdir(directory) if is_remote(directory) else os.listdir(directory)


def write_files(directory, writers, flush=True):
    """
    Write files so that a crash leaves each whole or absent, and a failure changes none.

    All are written under temporary names and flushed to the disk first, then renamed in order. Where
    they replace older ones, the last of them goes first and comes last: it stands for the set.

    :param writers: {file name: function that writes to the binary file it is given}.
    :param flush: False leaves the flushing to the system, which takes a tenth of the time for small files: then a
                  crash of the machine itself may cut short what it came right after.
    :raises InputError: if one cannot be written.
    """
    staged = {}  # final path -> temporary path, or a buffer for what is not on a local disk
    try:
        for name, write in writers.items():
            path = bf.join(directory, name)
            if is_remote(path):
                staged[path] = io.BytesIO()
                write(staged[path])
                continue
            os.makedirs(directory, exist_ok=True)
            staged[path] = path + TEMPORARY
            with open(staged[path], "wb") as f:
                write(f)
                f.flush()
                if flush:
                    os.fsync(f.fileno())
    except BaseException as e:
        for temporary in staged.values():
            if isinstance(temporary, str):
                with contextlib.suppress(OSError):
                    os.remove(temporary)
        # the second is torch.save's for a full disk, or that of what gives the content
        if isinstance(e, (OSError, RuntimeError)) and not is_loss_of_a_worker(e):
            raise _cannot_be_written(path, e) from e
        raise

    last = path
    try:
        if len(staged) > 1 and bf.exists(last):
            bf.remove(last)
        for path, temporary in staged.items():
            if isinstance(temporary, str):
                if path == last and len(staged) > 1:
                    _flush_directory(directory)  # the others are there before the one that stands for them
                os.replace(temporary, path)
            else:
                with bf.BlobFile(path, "wb") as f:
                    f.write(temporary.getbuffer())
        if flush and not is_remote(directory):
            _flush_directory(directory)
    except (OSError, bf.Error) as e:
        raise _cannot_be_written(path, e) from e


def _cannot_be_written(path, error):
    if isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save's own words are about its format
    return InputError(f"{path}: cannot be written ({first_line(error)})")


def _flush_directory(directory):
    """Make renames in a folder survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
