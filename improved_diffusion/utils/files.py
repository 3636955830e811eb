"""
Files and folders, on a local disk or at a URL that blobfile knows.

What is written is whole or absent, whenever a crash or a full disk comes.
"""

import contextlib
import errno
import io
import os
import platform
import time

import blobfile as bf

from .errors import InputError, first_line, is_loss_of_a_worker

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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

    All are written under temporary names and flushed, then renamed in order. The last file marks a complete set:
    the old one is removed first, the new one is renamed last. Its temporary file, once whole, marks a set that only
    needs renaming: after a crash there, rename_files() completes it.

    :param writers: {file name: function that writes to a binary file}.
    :param flush: False leaves flushing to the system: ten times faster for small files, but a crash of the machine
                  may truncate them.
    :raises InputError: if one cannot be written.
    """
    staged = {}  # final path -> temporary path, or a buffer for what is not on a local disk
    path = bf.join(directory, list(writers)[-1])
    try:
        if len(writers) > 1 and not is_remote(directory) and os.path.lexists(path + TEMPORARY):
            open(path + TEMPORARY, "wb").close()  # an earlier crash's must not mark the files written now
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
        for temporary in reversed(staged.values()):  # the last, which marks the set, first
            if isinstance(temporary, str):
                with contextlib.suppress(OSError):
                    os.remove(temporary)
        # torch.save raises RuntimeError for a full disk
        if isinstance(e, (OSError, RuntimeError)) and not is_loss_of_a_worker(e):
            raise _cannot_be_written(path, e) from e
        raise

    last = path
    try:
        if len(staged) > 1 and bf.exists(last):
            if not is_remote(directory):
                _flush_directory(directory)  # the new files have their temporary names before the old set ends
            bf.remove(last)
        for path, content in staged.items():
            if is_remote(path):
                with bf.BlobFile(path, "wb") as f:
                    f.write(content.getbuffer())
    except (OSError, bf.Error) as e:
        raise _cannot_be_written(path, e) from e
    if not is_remote(directory):
        rename_files(directory, list(writers), flush)


def rename_files(directory, names, flush=True):
    """
    Give temporary files in a local folder their names, in order. Files without a temporary one stay.

    :param flush: as of write_files().
    :raises InputError: if one cannot be renamed.
    """
    try:
        for name in names:
            path = os.path.join(directory, name)
            if name == names[-1] and len(names) > 1:
                _flush_directory(directory)  # the others first: it marks the set
            if os.path.lexists(path + TEMPORARY):
                os.replace(path + TEMPORARY, path)
        if flush:
            _flush_directory(directory)
    except OSError as e:
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
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems flush files only
            raise
    finally:
        os.close(fd)


class FolderLock:
    """
    A lock on a folder, for one process at a time; it ends with the process, however that ends.

    It is advisory, a file in the folder. Remote folders, and file systems without locks, are not locked.
    """

    NAME = ".lock"

    def __init__(self, directory, patience=10.0):
        self.directory, self.patience = directory, patience
        self._path = os.path.join(directory, self.NAME)
        self._descriptor = None

    def acquire(self):
        """
        Take the lock, waiting up to `patience` seconds for another process to end.

        :raises InputError: if another process keeps it.
        """
        if fcntl is None or is_remote(self.directory):
            return
        end, waiting = time.monotonic() + self.patience, False
        while (holder := self._try()) is not None:
            problem = f"{self.directory} is in use by another run ({holder})"
            if time.monotonic() >= end:
                raise InputError(f"{problem}: stop that one, or take another folder")
            if not waiting:
                with contextlib.suppress(OSError):  # nobody may be there to read it
                    print(f"{problem}: waiting for its end", flush=True)
            waiting = True
            time.sleep(0.1)

    def _try(self):
        """:return: who holds the lock; None if this process does now, or if there are no locks here."""
        try:
            os.makedirs(self.directory, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # the run's first file will fail likewise, with its own line
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # child processes do not inherit it, as flock()'s
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            return holder or "one that has just begun"
        except OSError:  # no locks on this file system
            os.close(descriptor)
            return None
        if os.fstat(descriptor).st_nlink == 0:  # removed by its holder, between the two calls
            os.close(descriptor)
            return self._try()
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        return None

    def release(self):
        """Give the lock back, if this process has it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.remove(self._path)
            os.close(self._descriptor)
            self._descriptor = None
