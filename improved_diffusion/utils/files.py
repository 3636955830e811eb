"""Files and folders, local or at a URL for blobfile. Writes are atomic: a file is whole or absent after a crash."""

import contextlib
import errno
import io
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import blobfile as bf

from .errors import InputError, first_line, is_dead_worker_error, is_out_of_memory
from .streams import show

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp"  # suffix of a file until it is whole
READABLE = re.compile(r"(gs|az)://|https://[^/]+\.blob\.")


def is_remote(path: str) -> bool:
    """Whether a path is a URL, such as gs://bucket/folder."""
    return "://" in path


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it, links resolved. Neither has to exist."""
    if is_remote(path) or is_remote(folder):
        return is_remote(path) and f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def user_path(path: str) -> str:
    """
    A path that a user gives, with ~ expanded.

    :raises InputError: for a URL that blobfile cannot open.
    """
    if not is_remote(path):
        return os.path.expanduser(path)
    try:
        if not READABLE.match(path):  # early versions of blobfile take other URLs for local paths
            raise ValueError
        bf.join(bf.dirname(path), "")  # parses it
    except (bf.Error, ValueError):  # the latter for https://[
        supported = "gs://BUCKET/..., az://ACCOUNT/CONTAINER/... or https://ACCOUNT.blob.core.windows.net/CONTAINER/..."
        raise InputError(f"{path}: not a URL that can be read; give a local path, {supported}") from None
    return path


def checkpoint_url() -> str:
    """The folder for checkpoints in DIFFUSION_BLOB_LOGDIR, or "". :raises InputError: as user_path()."""
    try:
        return user_path(os.environ.get("DIFFUSION_BLOB_LOGDIR", ""))
    except InputError as e:
        raise InputError(f"DIFFUSION_BLOB_LOGDIR {e}") from None


def list_folder(directory: str) -> Iterable[str]:
    """The names in a folder, unordered."""
    # blobfile would stat() every local file, and fail at a broken link
    return bf.listdir(directory) if is_remote(directory) else os.listdir(directory)


def write_files(directory: str, writers: dict[str, Callable[[Any], object]], flush: bool = True) -> None:
    """
    Write a set of files: after a crash each is whole or absent, after an error none has changed.

    Write all under temporary names, flush, then rename in order. The last file marks a complete set: the old one is
    removed before the first rename, the new one is renamed last. Its whole temporary file marks a set that only lacks
    renames, which rename_files() completes after a crash.

    :param directory: "" for the working directory.
    :param writers: {file name: function that writes to a binary file}.
    :param flush: False skips fsync: ten times faster for small files, but a crash of the machine may truncate them.
    :raises InputError: if a file cannot be written.
    """
    directory = directory or "."
    staged: dict[str, Any] = {}  # final path -> temporary path, or the content for a URL
    path = bf.join(directory, list(writers)[-1])
    try:
        if len(writers) > 1 and not is_remote(directory) and os.path.lexists(path + TEMPORARY):
            _create(path + TEMPORARY).close()  # one left by a crash must not mark this set
        for name, write in writers.items():
            path = bf.join(directory, name)
            if is_remote(path):
                staged[path] = io.BytesIO()
                write(staged[path])
                continue
            os.makedirs(directory, exist_ok=True)
            staged[path] = path + TEMPORARY
            with _create(staged[path]) as f:
                write(f)
                f.flush()
                if flush:
                    os.fsync(f.fileno())
    except BaseException as e:
        for temporary in reversed(staged.values()):  # the last marks the set, so it goes first
            if isinstance(temporary, str):
                with contextlib.suppress(OSError):
                    os.remove(temporary)
        # for a full disk torch.save raises RuntimeError
        if isinstance(e, (OSError, RuntimeError)) and not (is_dead_worker_error(e) or is_out_of_memory(e)):
            raise _cannot_be_written(path, e) from e
        raise

    last = path
    try:
        if len(staged) > 1 and bf.exists(last):
            if not is_remote(directory):
                _flush_directory(directory)  # the new set is on disk before the old one ends
            bf.remove(last)
        for path, content in staged.items():
            if is_remote(path):
                with bf.BlobFile(path, "wb") as f:
                    f.write(content.getbuffer())
    except (OSError, bf.Error) as e:
        raise _cannot_be_written(path, e) from e
    if not is_remote(directory):
        rename_files(directory, list(writers), flush)


def _create(path):
    """Open a new file, in place of an old one. A link is replaced, not followed."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    return open(path, "xb")


def rename_files(directory: str, names: list[str], flush: bool = True) -> None:
    """
    Rename the temporary files of a local folder to their final names, in order. Names without one are skipped.

    :param flush: as in write_files().
    :raises InputError: if a file cannot be renamed.
    """
    try:
        for name in names:
            path = os.path.join(directory, name)
            if name == names[-1] and len(names) > 1:
                _flush_directory(directory)  # the others before the one that marks the set
            if os.path.lexists(path + TEMPORARY):
                os.replace(path + TEMPORARY, path)
        if flush:
            _flush_directory(directory)
    except OSError as e:
        raise _cannot_be_written(path, e) from e


def _cannot_be_written(path, error):
    if isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save's message is about its format
    return InputError(f"{path}: cannot be written ({first_line(error)})")


def _flush_directory(directory):
    """Make renames in a folder survive a power cut. Windows cannot open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(fd)


class FolderLock:
    """
    An advisory lock on a folder for one process, a file in it. The system releases it when the process ends.

    Remote folders, and file systems without locks, are not locked.
    """

    NAME = ".lock"

    def __init__(self, directory: str, patience: float = 10.0):
        self.directory, self.patience = directory, patience
        self._path = os.path.join(directory, self.NAME)
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """
        Take the lock. Wait up to `patience` seconds for another process to release it.

        :raises InputError: if it does not.
        """
        if fcntl is None or is_remote(self.directory):
            return
        end, waiting = time.monotonic() + self.patience, False
        while (holder := self._try()) is not None:
            problem = f"{self.directory} is in use by another run ({holder})"
            if time.monotonic() >= end:
                raise InputError(f"{problem}: stop it, or give another folder")
            if not waiting:
                show(f"{problem}: waiting for its end")
            waiting = True
            time.sleep(0.1)

    def holder(self) -> str | None:
        """What has the lock, in words; None if nothing has. Not for a process that has it: it would lose it."""
        holder = self._try()
        if holder is None:
            self.release()
        return holder

    def _try(self):
        """:return: the holder of the lock; None if this process has it now, or nothing can be locked."""
        try:
            os.makedirs(self.directory, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise InputError(f"{self._path}: is a link, whose target would be overwritten; remove it") from None
            return None  # the run's first file fails too, and its message is clearer
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock()'s, not inherited by child processes
        except OSError as e:
            busy = isinstance(e, (BlockingIOError, PermissionError))  # else: a file system without locks
            holder = (os.pread(descriptor, 1000, 0).decode(errors="replace") or "just started") if busy else None
            os.close(descriptor)
            return holder
        if os.fstat(descriptor).st_nlink == 0:  # its holder removed the file between open and lock
            os.close(descriptor)
            return self._try()
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # the disk may be full
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        return None

    def release(self) -> None:
        """Release the lock if this process has it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.remove(self._path)
            os.close(self._descriptor)
            self._descriptor = None
