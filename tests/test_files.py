"""Files that are whole or absent, and folders as they are listed."""

import io
import os

import blobfile as bf
import pytest
from harness import snapshot

from improved_diffusion.errors import InputError
from improved_diffusion.files import is_remote, list_folder, write_files


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
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (TypeError("a bug"), TypeError, None),
    ],
    ids=["full", "torch", "wordless", "worker", "interrupt", "bug"],
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
