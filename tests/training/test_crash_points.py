"""
A process that dies at any moment of writing, deleting or completing checkpoints: a complete one is found, of one piece.

Each scenario runs once for each of its operations on files, and dies in the middle of that one.
"""

import contextlib
import errno
import itertools
import os
import shutil
import zipfile

import blobfile as bf
import pytest
import torch as th
from dying_disk import DyingDisk, Killed
from training import load, on_one_cpu

from improved_diffusion import dist_util, logger
from improved_diffusion.training.checkpoints import (
    delete_old_sets,
    ema_filename,
    model_filename,
    optimizer_filename,
    read_newest_set,
    save_set,
    state_filename,
)
from improved_diffusion.utils import files
from improved_diffusion.utils.errors import FileAccessError, InputError


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch, tmp_path_factory):
    on_one_cpu(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the operations' order counts here, and not the disk
    with logger.scoped_configure(dir=str(tmp_path_factory.mktemp("log")), format_strs=[]):
        yield


KINDS = (model_filename, lambda step: ema_filename(0.9, step), optimizer_filename, state_filename)


def write(folder, step, version, state=True):
    """A set all of whose files say of which version they are."""
    value = {"version": th.full((30,), version)}
    save_set(str(folder), step, model=value, emas={0.9: value}, optimizer=value, state=value)
    if not state:
        os.remove(folder / state_filename(step))


def newest(folder):
    """The model file of the newest complete set."""
    found = read_newest_set(folder)
    return found and found[0]


def found(folder):
    """(step, version) of what auto finds, None if it finds nothing; its files are of one version."""
    path = newest(str(folder))
    if path is None:
        return None
    step = int(os.path.basename(path)[5:-3])
    there = [folder / kind(step) for kind in KINDS if (folder / kind(step)).exists()]
    versions = {load(path)["version"][0].item() for path in there}
    assert len(there) >= 3 and len(versions) == 1, (there, versions)
    return step, versions.pop()


def fresh(folder):
    write(folder, 0, 2)


def overwriting(folder):
    write(folder, 8, 2)


def extending(folder):
    write(folder, 10, 2)
    delete_old_sets(str(folder), 10, 1)


def keeping_two(folder):
    write(folder, 10, 2)
    delete_old_sets(str(folder), 10, 2)


def nothing(folder):
    pass


def one_set(folder):
    write(folder, 8, 1)


def three_sets(folder):
    for step in (4, 6, 8):
        write(folder, step, 1)


def one_of_the_original(folder):
    write(folder, 8, 1, state=False)


SCENARIOS = {
    "fresh": (nothing, fresh, {None, (0, 2)}),
    "overwriting": (one_set, overwriting, {(8, 1), (8, 2)}),
    "overwriting with older sets": (three_sets, overwriting, {(8, 1), (8, 2)}),
    "saving and deleting": (one_set, extending, {(8, 1), (10, 2)}),
    "saving and deleting many": (three_sets, extending, {(8, 1), (10, 2)}),
    "saving and keeping two": (three_sets, keeping_two, {(8, 1), (10, 2)}),
    "deleting the original's": (one_of_the_original, extending, {(8, 1), (10, 2)}),
}


def crashes(tmp_path, before, during):
    """For each operation of during(folder), a folder in which it was the last and ended in its middle."""
    start = tmp_path / "start"
    start.mkdir()
    before(start)
    for k in itertools.count():
        folder = tmp_path / f"crash{k}"
        shutil.copytree(start, folder)
        try:
            with DyingDisk(k):
                during(folder)
        except Killed:
            yield folder
        else:
            assert k > 10
            return


def assert_goes_on(folder):
    """The next save and deletion leave nothing but their set."""
    write(folder, 12, 3)
    delete_old_sets(str(folder), 12, 1)
    assert found(folder) == (12, 3)
    assert {path.name for path in folder.iterdir()} == {kind(12) for kind in KINDS}


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_each_operation(tmp_path, name):
    before, during, allowed = SCENARIOS[name]
    outcomes = []
    for folder in crashes(tmp_path, before, during):
        outcomes.append(found(folder))
        assert outcomes[-1] in allowed, (folder.name, sorted(os.listdir(folder)))
        assert_goes_on(folder)
    print(f"{name}: {len(outcomes)} crash points, {[len(list(g)) for _, g in itertools.groupby(outcomes)]} alike")
    assert set(outcomes) == allowed


@pytest.mark.parametrize("name", ["fresh", "overwriting"])
def test_killed_again_while_the_set_is_completed(tmp_path, name):
    """At each operation of auto's, after each moment at which there is something for it to complete."""
    before, during, allowed = SCENARIOS[name]
    completed = 0
    for i, crashed in enumerate(crashes(tmp_path, before, during)):
        with DyingDisk() as disk:
            found(crashed)
        if disk.count == 0:
            continue
        completed += 1

        def again(folder, k=i):
            with contextlib.suppress(Killed), DyingDisk(k):
                during(folder)

        for folder in crashes_of_auto(tmp_path / f"again{i}", before, again, disk.count):
            assert found(folder) in allowed - {None}
            assert_goes_on(folder)
    assert completed > 3


def crashes_of_auto(tmp_path, before, crash, count):
    start = tmp_path / "start"
    start.mkdir(parents=True)
    before(start)
    crash(start)
    for k in range(count):
        folder = tmp_path / str(k)
        shutil.copytree(start, folder)
        with pytest.raises(Killed), DyingDisk(k):
            newest(str(folder))
        yield folder


@pytest.mark.parametrize("first", [14, 15, 17, 18])  # while and after the last file is written
@pytest.mark.parametrize("steps", [(4,), (4, 8)], ids=["new", "overwritten"])
def test_killed_in_two_saves_of_one_step(tmp_path, steps, first):
    """By runs without auto: what the first left under temporary names is never mixed with the second's."""

    def killed_once(folder):
        for step in steps:
            write(folder, step, 1)
        with pytest.raises(Killed), DyingDisk(first):
            write(folder, 8, 2)
        assert list(folder.glob("state000008.pt.tmp"))

    for folder in crashes(tmp_path, killed_once, lambda folder: write(folder, 8, 3)):
        assert found(folder) in {(4, 1), (8, 1), (8, 2), (8, 3)}


def test_killed_while_a_failed_save_is_cleaned_up(tmp_path):
    """Its whole temporary files are never mixed with those of an older set of the step that has no state."""

    def before(folder):
        write(folder, 4, 1)
        write(folder, 8, 1)
        os.remove(folder / state_filename(8))

    def failing(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "_flush_directory", None)  # not reached
            flush, flushed = os.fsync, []

            def fail_at_last(fd):
                flush(fd)
                flushed.append(fd)
                if len(flushed) == len(KINDS):
                    raise OSError(5, "Input/output error")

            patch.setattr(os, "fsync", fail_at_last)
            with pytest.raises(InputError, match="Input/output"):
                write(folder, 8, 2)

    for folder in crashes(tmp_path, before, failing):
        assert found(folder) in {(4, 1), (8, 2)}


@pytest.mark.parametrize("missing", ["model", "state", "opt"])
def test_files_of_sets_without_a_complete_one_are_not_overwritten(tmp_path, missing):
    """Auto does not start over among them."""
    write(tmp_path, 8, 1, state=missing != "opt")
    for path in tmp_path.glob(f"{missing}*"):
        path.unlink()
    if missing == "state":  # the optimizer too, or it would be one of the original's
        os.remove(tmp_path / optimizer_filename(8))
    with pytest.raises(InputError, match=str(tmp_path)):
        newest(str(tmp_path))


@pytest.mark.parametrize("damaged", [kind(8) for kind in KINDS])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_set_with_a_damaged_temporary_file_is_not_completed(tmp_path, damaged, damage):
    write(tmp_path, 4, 1)
    write(tmp_path, 8, 2)
    for kind in KINDS:
        os.rename(tmp_path / kind(8), tmp_path / (kind(8) + ".tmp"))
    path = tmp_path / (damaged + ".tmp")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    before = sorted(os.listdir(tmp_path))
    assert found(tmp_path) == (4, 1)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_set_with_a_small_file_that_unpacks_to_a_large_one_is_left_out(tmp_path):
    write(tmp_path, 4, 1)
    write(tmp_path, 8, 2)
    path = tmp_path / model_filename(8)
    th.save({"version": th.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert newest(str(tmp_path)) == str(tmp_path / model_filename(4))


@pytest.mark.parametrize("names", [["../opt000008.pt"], ["model000004.pt"], "model000008.pt", None, [["x"]]])
def test_a_temporary_state_names_files_of_its_own_set_only(tmp_path, names):
    write(tmp_path, 4, 1)
    write(tmp_path, 8, 2)
    os.remove(tmp_path / state_filename(8))
    th.save({"files": names}, tmp_path / (state_filename(8) + ".tmp"))
    assert found(tmp_path) == (4, 1)


# ---------------------------------------------------------------- files that are there and cannot be read


@pytest.mark.parametrize(
    "error", [(errno.EACCES, "ermission"), (errno.EIO, "Input/output error")], ids=["EACCES", "EIO"]
)
@pytest.mark.parametrize("name", ["model000008.pt", "opt000008.pt", "state000008.pt", "state000008.pt.tmp", "folder"])
def test_what_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch, name, error):
    """Going back to an older set would overwrite the good one."""
    number, text = error

    def refused(path):
        raise OSError(number, os.strerror(number), path)

    write(tmp_path, 4, 1)
    write(tmp_path, 8, 2)
    if name.endswith(".tmp"):
        os.rename(tmp_path / "state000008.pt", tmp_path / name)
    if name == "folder":
        monkeypatch.setattr(os, "listdir", refused)
    else:
        open_file = bf.BlobFile
        monkeypatch.setattr(
            bf, "BlobFile", lambda path, mode: refused(path) if path.endswith(name) else open_file(path, mode)
        )
    with pytest.raises(FileAccessError, match=text) as info:
        newest(str(tmp_path))
    assert str(tmp_path) in str(info.value)


def test_files_that_vanish_while_they_are_read(tmp_path, monkeypatch):
    """Another run has deleted the set and written the next one: the folder is listed once more, without a warning."""
    write(tmp_path, 8, 1)
    read, warnings = dist_util.read_state_dict, []

    def read_beside_another_run(path, **kwargs):
        if not (tmp_path / "model000010.pt").exists():
            extending(tmp_path)
        return read(path, **kwargs)

    monkeypatch.setattr(dist_util, "read_state_dict", read_beside_another_run)
    monkeypatch.setattr(logger, "warn", warnings.append)
    assert found(tmp_path) == (10, 2) and warnings == []


def test_files_that_vanish_for_ever(tmp_path, monkeypatch):
    """The folder is listed twice, not without end."""
    write(tmp_path, 8, 1)
    attempts = []

    def vanish(path, **kwargs):
        attempts.append(path)
        for kind in KINDS:
            os.remove(tmp_path / kind(7 + len(attempts)))
        write(tmp_path, 8 + len(attempts), 1)
        raise InputError(f"{path}: there is no such file")

    monkeypatch.setattr(dist_util, "read_state_dict", vanish)
    with pytest.raises(InputError, match=str(tmp_path)):
        newest(str(tmp_path))
    assert len(attempts) == 2


@pytest.mark.parametrize("left", [["model000000.pt"], ["model000000.pt", "ema_0.9_000000.pt"]])
def test_a_first_save_to_a_url_that_was_cut_off(monkeypatch, left):
    """There are no temporary files there; the run begins anew by the same command."""
    monkeypatch.setattr(bf, "isdir", lambda path: True)
    monkeypatch.setattr(bf, "listdir", lambda path: iter(left))
    assert newest("gs://bucket/run") is None
    monkeypatch.setattr(bf, "listdir", lambda path: iter([name.replace("000.", "009.") for name in left]))
    with pytest.raises(InputError, match="gs://bucket/run"):
        newest("gs://bucket/run")


def test_previews_that_were_cut_off_are_deleted(tmp_path):
    names = [
        "preview_000008.png.tmp",
        "preview_000008_model.png.tmp",
        "preview_000008.png",
        "preview_x.png.tmp",
        "other.png.tmp",
    ]
    for name in names:
        (tmp_path / name).touch()
    write(tmp_path, 8, 1)
    delete_old_sets(str(tmp_path), 8, 1)
    assert [name for name in names if (tmp_path / name).exists()] == names[2:]
