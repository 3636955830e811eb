"""What a run leaves on disk: names, whole sets, files that are whole or absent, generators that go on."""

import io
import os
import random

import blobfile as bf
import numpy as np
import pytest
import torch as th
from harness import snapshot
from training import assert_same, load, on_one_cpu

from improved_diffusion import checkpoint_util
from improved_diffusion.checkpoint_util import (
    ema_filename,
    find_ema_checkpoint,
    find_optimizer_checkpoint,
    find_state_checkpoint,
    model_filename,
    optimizer_filename,
    parse_resume_step_from_filename,
    rng_state,
    save_set,
    set_rng_state,
    state_filename,
    write_files,
)
from improved_diffusion.errors import InputError


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    on_one_cpu(monkeypatch)


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


# ---------------------------------------------------------------- names


def test_names():
    assert model_filename(0) == "model000000.pt"
    assert ema_filename(0.9999, 25) == "ema_0.9999_000025.pt"
    assert optimizer_filename(1234567) == "opt1234567.pt"
    assert state_filename(10) == "state000010.pt"


@pytest.mark.parametrize(
    "name, step",
    [
        ("model000100.pt", 100),
        ("path/to/model1234567.pt", 1234567),
        ("gs://bucket/model7/model000020.pt", 20),
        ("my_model000003.pt", 3),
        ("model.pt", 0),
        ("modelabc.pt", 0),
        ("model-5.pt", 0),
        ("ema_0.9999_000100.pt", 0),
        ("model000100/weights.pt", 0),
        ("64x64_diffusion.pt", 0),
        ("000100.pt", 0),
        ("", 0),
    ],
)
def test_step_of_a_name(name, step):
    assert parse_resume_step_from_filename(name) == step


@pytest.mark.parametrize(
    "find, name",
    [
        (lambda main: find_ema_checkpoint(main, 5, 0.99), "ema_0.99_000005.pt"),
        (lambda main: find_optimizer_checkpoint(main, 5), "opt000005.pt"),
        (lambda main: find_state_checkpoint(main, 5), "state000005.pt"),
    ],
)
def test_files_beside_a_model(tmp_path, find, name):
    main = str(tmp_path / "model000005.pt")
    assert find(main) is None
    (tmp_path / name).touch()
    assert find(main) == str(tmp_path / name)
    assert find("") is None


def test_a_run_goes_on_from_its_own_model_only(tmp_path):
    """An average beside the state of step 0 is the start of another run."""
    (tmp_path / "state000000.pt").touch()
    assert find_state_checkpoint(str(tmp_path / "model000000.pt"), 0)
    assert find_state_checkpoint(str(tmp_path / "ema_0.9_000007.pt"), 0) is None


# ---------------------------------------------------------------- sets of files


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


def test_a_set_on_disk(tmp_path, monkeypatch):
    parts = dict(
        model={"w": th.arange(3.0)},
        emas={0.5: {"w": th.zeros(3)}, 0.9999: {"w": th.ones(3)}},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1}]},
        state={"updates": 4, "rng": [None]},
    )
    events = observe(monkeypatch)
    assert save_set(str(tmp_path), 3, **parts) == str(tmp_path / "model000003.pt")
    assert [name for what, name in events if what == "rename"][-1] == "state000003.pt"  # it stands for the set
    names = ["ema_0.5_000003.pt", "ema_0.9999_000003.pt", "model000003.pt", "opt000003.pt", "state000003.pt"]
    assert sorted(os.listdir(tmp_path)) == names
    expected = [*parts["emas"].values(), parts["model"], parts["optimizer"], parts["state"]]
    assert_same([load(tmp_path / name) for name in names], expected)


def test_folders_are_made(tmp_path):
    """As the original does, whose blobfile makes them."""
    write_files(str(tmp_path / "a" / "b"), {"x": writer(b"1")})
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"1"


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
        (OSError(28, "No space left on device"), InputError, r"\[Errno 28\] No space left on device"),
        (RuntimeError("unexpected pos 64 vs 0\nand a traceback"), InputError, "unexpected pos 64 vs 0"),
        (RuntimeError(), InputError, ""),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (TypeError("a bug"), TypeError, None),
    ],
    ids=["full", "torch", "wordless", "interrupt", "bug"],
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
    removal = [("remove", "state")] if replaced else []
    assert events == flushes + removal + renames + [("flush", tmp_path.name)]


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


# ---------------------------------------------------------------- random generators


def draw():
    """From every generator, Gaussian ones too, which keep a second value for later."""
    return [th.randn(3), th.randint(10, (2,)), np.random.randn(), np.random.choice(100, 5).tolist()]


@pytest.mark.parametrize("drawn_before", [0, 1, 700])
def test_generators_go_on(tmp_path, drawn_before):
    th.manual_seed(3)
    np.random.seed(4)
    for _ in range(drawn_before):
        np.random.randn()
        th.rand(1)
    th.save(rng_state(), tmp_path / "rng.pt")
    want = draw()
    draw()
    set_rng_state(load(tmp_path / "rng.pt"))
    assert_same(draw(), want)


def test_other_generators_are_left_alone():
    random.seed(1)
    want = random.Random(1).random()
    set_rng_state(rng_state())
    assert random.random() == want


def test_generator_of_the_device(monkeypatch):
    """This rank's alone, and not asked for where there is none now."""
    state = rng_state()
    given = []
    monkeypatch.setattr(th.cuda, "is_available", lambda: True)
    monkeypatch.setattr(th.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(th.cuda, "get_rng_state", lambda device: th.tensor([device.index]))
    monkeypatch.setattr(th.cuda, "set_rng_state", lambda state, device: given.append((state.item(), device.index)))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    on_gpu = checkpoint_util.rng_state()
    assert on_gpu["cuda"].item() == 3 and "cuda" not in state
    set_rng_state(state)
    set_rng_state(on_gpu)
    assert given == [(3, 3)]
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    set_rng_state(on_gpu)
    assert len(given) == 1
