"""Files that are whole or absent, and folders as they are listed."""

import errno
import io
import os
import signal
import subprocess
import sys

import blobfile as bf
import pytest
from harness import snapshot

from improved_diffusion.utils import files
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.files import FolderLock, checkpoint_url, is_remote, list_folder, user_path, write_files


def writer(content):
    return lambda f: f.write(content)


def failing(error):
    """A writer that gives up in the middle."""

    def write(f):
        f.write(b"half of")
        raise error

    return write


def contents(folder):
    return {name: data.decode() for name, data in snapshot(folder).items()}


def observe(monkeypatch):
    """A list that fills with what happens to files: (what, name)."""
    events = []

    def observed(module, function, what, name_of):
        original = getattr(module, function)

        def call(*args):
            events.append((what, name_of(*args)))
            return original(*args)

        monkeypatch.setattr(module, function, call)

    observed(os, "fsync", "flush", lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
    observed(os, "replace", "rename", lambda _, path: os.path.basename(path))
    observed(bf, "remove", "remove", os.path.basename)
    return events


def test_a_name_alone_is_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files("", {"a": writer(b"new")})
    assert contents(tmp_path) == {"a": "new"}


def test_folders_are_made(tmp_path):
    """As the original does, whose blobfile makes them."""
    write_files(str(tmp_path / "a" / "b"), {"x": writer(b"1")})
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"


def test_unflushed_files_are_renamed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", None)
    write_files(str(tmp_path / "a"), {"x": writer(b"1")}, flush=False)
    with pytest.raises(KeyboardInterrupt):
        write_files(str(tmp_path / "a"), {"y": failing(KeyboardInterrupt())}, flush=False)
    assert contents(tmp_path / "a") == {"x": "1"}


def test_no_leftover_counts(tmp_path):
    """What a crash left under a temporary name is overwritten."""
    (tmp_path / "x.tmp").write_bytes(b"longer than the new one")
    write_files(str(tmp_path), {"x": writer(b"1")})
    assert contents(tmp_path) == {"x": "1"}


@pytest.mark.parametrize("there", [{}, {"a": "old", "b": "old", "c": "old"}])
@pytest.mark.parametrize("failed", ["a", "b", "c"])
@pytest.mark.parametrize(
    "error, raised, reason",
    [
        (OSError(28, "No space left on device"), InputError, "No space left on device"),
        (RuntimeError("unexpected pos 64 vs 0\nand a traceback"), InputError, "unexpected pos 64 vs 0"),
        (RuntimeError(), InputError, ""),
        (RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "), RuntimeError, None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError, None),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (TypeError("a bug"), TypeError, None),
    ],
    ids=["full", "torch", "wordless", "worker", "memory", "interrupt", "bug"],
)
def test_a_failure_changes_nothing(tmp_path, there, failed, error, raised, reason):
    for name, content in there.items():
        (tmp_path / name).write_text(content)
    writers = {name: failing(error) if name == failed else writer(b"new") for name in "abc"}
    with pytest.raises(raised) as info:
        write_files(str(tmp_path), writers)
    assert contents(tmp_path) == there
    if raised is InputError:
        info.match(f"^{tmp_path / failed}: cannot be written \\({reason}\\)$")


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/x: cannot be written"):
        write_files(str(tmp_path / "file"), {"x": writer(b"1")})


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
@pytest.mark.parametrize("replaced", [False, True])
def test_order(tmp_path, monkeypatch, replaced):
    """All is on the disk before the first name changes; the last file stands for the set."""
    writers = {name: writer(b"1") for name in ("model", "opt", "state")}
    if replaced:
        write_files(str(tmp_path), writers)
    events = observe(monkeypatch)
    write_files(str(tmp_path), writers)
    flushes = [("flush", f"{name}.tmp") for name in writers]
    renames = [("rename", name) for name in writers]
    folder = ("flush", tmp_path.name)
    removal = [folder, ("remove", "state")] if replaced else []
    assert events == [*flushes, *removal, *renames[:-1], folder, renames[-1], folder]


def test_one_file_alone_is_never_absent(tmp_path, monkeypatch):
    write_files(str(tmp_path), {"samples.npz": writer(b"old")})
    monkeypatch.setattr(bf, "remove", None)
    write_files(str(tmp_path), {"samples.npz": writer(b"new")})
    assert contents(tmp_path) == {"samples.npz": "new"}


@pytest.mark.parametrize("survived", range(4))
def test_a_crash_between_renames(tmp_path, monkeypatch, survived):
    """Wherever it comes, a last file means that the set is of one piece."""
    names = ("model", "ema", "opt", "state")
    write_files(str(tmp_path), {name: writer(b"old") for name in names})
    rename, renamed = os.replace, []

    def crash(source, target):
        if len(renamed) == survived:
            raise SystemExit
        rename(source, target)
        renamed.append(target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(SystemExit):
        write_files(str(tmp_path), {name: writer(b"new") for name in names})
    left = {name: text for name, text in contents(tmp_path).items() if not name.endswith(".tmp")}
    assert left == {name: "new" if i < survived else "old" for i, name in enumerate(names[:3])}


class Bucket:
    """As much of blobfile as write_files() asks for beyond paths, in memory."""

    def __init__(self, monkeypatch):
        self.blobs, self.removed = {}, []
        monkeypatch.setattr(bf, "exists", lambda path: path in self.blobs)
        monkeypatch.setattr(bf, "remove", lambda path: self.removed.append((path, self.blobs.pop(path))))
        monkeypatch.setattr(bf, "BlobFile", self.open)

    def open(self, path, mode):
        assert mode == "wb"

        class Blob(io.BytesIO):
            def close(blob):
                self.blobs[path] = blob.getvalue()
                super().close()

        return Blob()


def test_files_in_a_cloud(monkeypatch):
    """Written to memory first, uploaded when all could be."""
    bucket = Bucket(monkeypatch)
    write_files("gs://bucket/run", {"model": writer(b"old"), "state": writer(b"old")})
    with pytest.raises(InputError, match="gs://bucket/run/state: cannot be written"):
        write_files("gs://bucket/run", {"model": writer(b"new"), "state": failing(OSError())})
    assert bucket.blobs == {"gs://bucket/run/model": b"old", "gs://bucket/run/state": b"old"}
    write_files("gs://bucket/run", {"model": writer(b"new"), "state": writer(b"new")})
    assert bucket.blobs == {"gs://bucket/run/model": b"new", "gs://bucket/run/state": b"new"}
    assert bucket.removed == [("gs://bucket/run/state", b"old")]


def test_folders_are_listed_with_broken_links(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nothing")
    assert sorted(list_folder(str(tmp_path))) == ["a", "broken", "folder"]


def test_folders_of_a_cloud_are_listed_by_blobfile(monkeypatch):
    monkeypatch.setattr(bf, "listdir", lambda path: iter([f"{path}/listed"]))
    assert list(list_folder("gs://bucket/run")) == ["gs://bucket/run/listed"]


@pytest.mark.parametrize("path, answer", [("gs://b/x", True), ("https://h/x", True), ("/a/b", False), ("", False)])
def test_what_is_remote(path, answer):
    assert is_remote(path) is answer


@pytest.mark.parametrize("error, written", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders(tmp_path, monkeypatch, error, written):
    """Refused for the folder alone; other errors are errors."""
    fsync = os.fsync

    def refuse(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(error, os.strerror(error))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    writers = {name: writer(b"1") for name in ("model", "state")}
    if written:
        write_files(str(tmp_path), writers)
        assert contents(tmp_path) == {"model": "1", "state": "1"}
    else:
        with pytest.raises(InputError, match=str(tmp_path)):
            write_files(str(tmp_path), writers)


def test_a_file_that_cannot_be_flushed_is_not_written(tmp_path, monkeypatch):
    def refuse(fd):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match="Invalid argument"):
        write_files(str(tmp_path), {"model": writer(b"1")})
    assert contents(tmp_path) == {}


# ---------------------------------------------------------------- locks

HOLDER = """
import os, sys, time
from improved_diffusion.utils.files import FolderLock
lock = FolderLock(sys.argv[1])
lock.acquire()
child = os.fork() if sys.argv[2] else None
if child == 0:
    time.sleep(100)
    os._exit(0)
print(child, flush=True)
sys.stdin.read()
lock.release()
"""
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no fcntl here")


def start_holder(folder, fork=""):
    command = [sys.executable, "-c", HOLDER, str(folder), fork]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def is_refused_to_another(folder):
    """Whether another process is refused the lock, since this one has it."""
    code = "import sys; from improved_diffusion.utils.files import FolderLock; FolderLock(sys.argv[1], 0).acquire()"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], stderr=subprocess.PIPE, text=True)
    return f"InputError: {folder} is in use by another run (process {os.getpid()} on " in done.stderr


@needs_locks
def test_a_folder_is_locked_by_one_process(tmp_path, capsys):
    folder = tmp_path / "run"
    holder, _ = start_holder(folder)
    with holder:
        with pytest.raises(InputError, match=f"^{folder} .*process {holder.pid} on "):
            FolderLock(str(folder), patience=0).acquire()
        assert f"process {holder.pid} on " in FolderLock(str(folder)).holder()
        capsys.readouterr()
        FolderLock(str(tmp_path / "other"), patience=0).acquire()
    lock = FolderLock(str(folder), patience=0)
    assert lock.holder() is None and contents(folder) == {}
    lock.acquire()
    assert capsys.readouterr().out == ""
    lock.release()
    lock.release()
    assert contents(folder) == {}


@needs_locks
def test_a_lock_ends_with_its_process(tmp_path, capsys):
    """However that ends, and though a child of its, such as one that reads images, lives on; who waits is told."""
    holder, child = start_holder(tmp_path, "fork")
    with holder:
        try:
            sleep = files.time.sleep
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files.time, "sleep", lambda seconds: (holder.kill(), sleep(seconds)))
                lock = FolderLock(str(tmp_path), patience=60)
                lock.acquire()
            os.kill(int(child), 0)
        finally:
            holder.kill()
            os.kill(int(child), signal.SIGKILL)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(tmp_path) in line and f"process {holder.pid}" in line
    assert is_refused_to_another(tmp_path)
    lock.release()
    assert not is_refused_to_another(tmp_path)


@needs_locks
def test_a_lock_that_its_holder_removes_at_that_moment(tmp_path, monkeypatch):
    """What was locked then is no file of the folder any more, and the next process would lock another."""
    lockf, removed = files.fcntl.lockf, []

    def remove_once(descriptor, how):
        if not removed:
            os.remove(tmp_path / FolderLock.NAME)
            removed.append(descriptor)
        lockf(descriptor, how)

    monkeypatch.setattr(files.fcntl, "lockf", remove_once)
    lock = FolderLock(str(tmp_path), patience=0)
    lock.acquire()
    assert removed and (tmp_path / FolderLock.NAME).exists()
    assert is_refused_to_another(tmp_path)
    lock.release()


@needs_locks
@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    def refuse(descriptor, how):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        FolderLock(str(tmp_path), patience=0).acquire()
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("folder", ["gs://bucket/run", "/dev/null/run"])
def test_folders_that_cannot_be_locked(folder):
    lock = FolderLock(folder, patience=0)
    lock.acquire()
    lock.release()


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    for _ in range(2):
        FolderLock(str(tmp_path), patience=0).acquire()
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "path", ["gs://bucket", "gs://bucket/a/b.pt", "az://account/container/a", "https://me.blob.core.windows.net/c/a"]
)
def test_urls_that_blobfile_opens_stay(path):
    assert user_path(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "s3://b/x",
        "file:///tmp/x",
        "http://h/x",
        "https://huggingface.co/x",
        "hf://a/b",
        "gs://",
        "GS://b/x",
        "https://[x",
    ],
)
def test_other_urls_are_refused_in_one_line(path):
    with pytest.raises(InputError) as info:
        user_path(path)
    assert [part for part in (path, "gs://", "az://", ".blob.core.windows.net") if part not in str(info.value)] == []


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [user_path(path) for path in ("~", "~/a", "a~", "", "auto")] == ["/home/me", "/home/me/a", "a~", "", "auto"]


def test_the_url_for_checkpoints(monkeypatch):
    assert checkpoint_url() == ""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "~/a")
    assert checkpoint_url() == "/home/me/a"
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "s3://b/x")
    with pytest.raises(InputError, match=r"^DIFFUSION_BLOB_LOGDIR s3://b/x: "):
        checkpoint_url()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, link, name):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    link(tmp_path / "precious", tmp_path / "run" / f"{name}.tmp")
    write_files(str(tmp_path / "run"), {"a": writer(b"1"), "b": writer(b"2")})
    assert (tmp_path / "precious").read_text() == "precious"
    assert contents(tmp_path / "run") == {"a": "1", "b": "2"}
    assert not (tmp_path / "run" / name).is_symlink()


def test_a_link_in_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(InputError, match=rf"^{tmp_path}/\.lock: "):
        FolderLock(str(tmp_path)).acquire()
    assert (tmp_path / "precious").read_text() == "precious"
