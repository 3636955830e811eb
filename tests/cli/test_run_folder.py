"""The folder of a training run: outside the images, and of one run alone."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from harness import TRAIN, flags, run_script, write_images

from improved_diffusion import train_util
from improved_diffusion.cli import parser
from improved_diffusion.options import TrainOptions
from improved_diffusion.utils.files import FolderLock


def parse(monkeypatch, capfd, **values):
    """The line that a command line ends in, "" if it is taken."""
    monkeypatch.setattr(sys, "argv", ["here/image_train.py", *flags(**values)])
    options = TrainOptions()
    try:
        parser.parse_flags(parser.create_parser(options, "something"), options)
    except SystemExit as e:
        assert e.code == 2
    err = capfd.readouterr().err
    assert err.count("\n") <= 1
    return err


# ---------------------------------------------------------------- outside the images


@pytest.mark.parametrize("log_dir", ["photos", "photos/", "photos/runs/a", "link", "link/b", "photos/../photos/c"])
def test_a_run_among_its_images_is_refused(tmp_path, monkeypatch, capfd, log_dir):
    """It would train on its previews."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to("photos")
    for data_dir in ("photos", tmp_path / "photos", "link"):
        err = parse(monkeypatch, capfd, data_dir=data_dir, log_dir=log_dir)
        assert f"--log_dir {log_dir}: " in err and str(data_dir) in err
    assert list((tmp_path / "photos").iterdir()) == []


def test_all_folders_that_a_run_writes_to_are_outside(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for data_dir in (".", tmp_path):
        assert "log_dir runs: " in parse(monkeypatch, capfd, data_dir=data_dir)  # the default
    (tmp_path / "photos").mkdir()
    assert parse(monkeypatch, capfd, data_dir="photos") == ""
    assert parse(monkeypatch, capfd, data_dir="photos", log_dir="photos2") == ""
    assert parse(monkeypatch, capfd, data_dir="photos/small", log_dir="photos") == ""
    monkeypatch.setenv("OPENAI_LOGDIR", "photos/runs")
    assert "OPENAI_LOGDIR photos/runs: " in parse(monkeypatch, capfd, data_dir="photos")
    assert parse(monkeypatch, capfd, data_dir="photos", log_dir="elsewhere") == ""
    monkeypatch.delenv("OPENAI_LOGDIR")
    for data_dir, folder in (("photos", "photos/runs"), ("gs://b/photos", "gs://b/photos/runs")):
        monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", folder)
        assert f"DIFFUSION_BLOB_LOGDIR {folder}: " in parse(monkeypatch, capfd, data_dir=data_dir)
    assert parse(monkeypatch, capfd, data_dir="gs://b/phot") == ""


# ---------------------------------------------------------------- of one run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Images, and the folder of a run of 4 steps with checkpoints 0, 2 and 4 and a preview of each."""
    folder = tmp_path_factory.mktemp("finished")
    words = flags(**{**TRAIN, "preview_samples": 1}, data_dir=write_images(folder / "images"))
    assert run_script("image_train", words, folder / "run") == 0
    return folder


@pytest.fixture
def used(tmp_path, finished):
    """A copy of that folder."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.fixture
def train(finished, capfd):
    """Run image_train.py in a folder. :return: its line of error, "" if it succeeds."""

    def run(folder, environment=None, **changed):
        words = {**TRAIN, "data_dir": finished / "images", "max_steps": 2, **changed}
        capfd.readouterr()
        status = run_script("image_train", flags(**words), folder, **(environment or {}))
        err = capfd.readouterr().err
        assert (status == 0) == (err == "") and err.count("\n") <= 1
        return err

    return run


def test_a_run_that_still_trains_is_not_to_be_overwritten(used, train, monkeypatch):
    monkeypatch.setattr(FolderLock, "holder", lambda self: f"process 7, in {self.directory}")
    err = train(used)
    assert f"process 7, in {used}" in err and "--overwrite" not in err


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(folder):
    rows = (folder / "progress.csv").read_text().splitlines()
    column = rows[0].split(",").index("step")
    return [int(row.split(",")[column]) for row in rows[1:]]


def test_the_same_command_again_is_refused_and_changes_nothing(used, train):
    before = content(used)
    for changed in ({}, dict(resume_checkpoint=used / "ema_0.9_000004.pt"), dict(log_dir=used)):
        err = train(used, **changed)
        assert str(used) in err and "step 4" in err
        assert "--overwrite True" in err and "--resume_checkpoint auto" in err
        assert content(used) == before
    assert train(used, dry_run=True) == ""


def test_overwrite_moves_the_other_run_aside_whole(used, train):
    (used / "notes.txt").write_text("mine")
    before = content(used)
    assert train(used, overwrite=True, learn_sigma=True) == ""
    del before["notes.txt"]
    assert content(used / "earlier-1") == before
    assert (used / "notes.txt").exists() and steps(used) == [0, 1]
    assert "earlier-1" in (used / "log.txt").read_text()
    # auto does not find the longer run
    assert train(used, resume_checkpoint="auto", max_steps=3) == "" and steps(used) == [0, 1, 2]


def test_each_run_has_its_own_subfolder(used, train):
    assert train(used, overwrite=True) == train(used, overwrite=True) == ""
    assert [(used / f"earlier-{i}" / "model000002.pt").exists() for i in (1, 2, 3)] == [True, True, False]


def test_auto_continues_even_with_overwrite(used, train):
    assert train(used, resume_checkpoint="auto", overwrite=True, max_steps=5) == ""
    assert steps(used) == [0, 1, 2, 3, 4] and not (used / "earlier-1").exists()


def test_a_run_that_goes_back_moves_only_newer_checkpoints(used, train):
    back = dict(resume_checkpoint=used / "model000002.pt", max_steps=3)
    assert train(used, **back) == "" and (used / "model000004.pt").exists()  # with a warning, as for client code
    assert train(used, **back, overwrite=True) == ""
    moved = {path.name for path in (used / "earlier-1").iterdir()}
    assert moved == {f"{kind}000004.pt" for kind in ("model", "ema_0.9_", "opt", "state")} | {
        "preview_000004_model.png"
    }
    assert (used / "model000002.pt").exists() and steps(used) == [0, 1, 2]


def test_a_new_run_from_anothers_weights_needs_an_unused_folder(used, train, tmp_path):
    for _ in range(2):
        err = train(tmp_path / "b", resume_checkpoint=used / "model000004.pt", max_steps=5)
    assert str(tmp_path / "b") in err and "step 4" in err


def test_the_weights_that_a_run_begins_at_stay(used, train, tmp_path):
    weights = tmp_path / "c" / "ema_0.9_000004.pt"
    weights.parent.mkdir()
    shutil.copy(used / weights.name, weights)
    assert train(weights.parent, resume_checkpoint=weights, overwrite=True) == "" and weights.exists()


def test_rows_of_two_runs_do_not_share_a_file(used, train):
    """Where the checkpoints were removed."""
    for path in used.glob("*.pt"):
        path.unlink()
    for changed in ({}, dict(resume_checkpoint="auto")):
        err = train(used, **changed)
        assert f"{used}: " in err and "progress.csv" in err and "--overwrite True" in err
    assert train(used, overwrite=True) == "" and steps(used) == [0, 1]


def test_checkpoints_in_another_folder(used, train, tmp_path):
    elsewhere = dict(environment=dict(DIFFUSION_BLOB_LOGDIR=str(tmp_path / "blob")))
    assert f"{used}: " in train(used, **elsewhere)
    assert train(used, **elsewhere, overwrite=True) == "" and steps(used) == [0, 1]
    assert f"{tmp_path / 'blob'}: " in train(tmp_path / "other", **elsewhere)
    assert train(used, **elsewhere, resume_checkpoint="auto", max_steps=3) == "" and steps(used) == [0, 1, 2]


def test_clients_that_find_their_checkpoint_continue(used, train, monkeypatch):
    """Forks replace find_resume_checkpoint(), so that the same command continues."""

    def newest():
        return os.path.join(train_util.get_blob_logdir(), "model000004.pt")

    monkeypatch.setattr(train_util, "find_resume_checkpoint", newest)
    assert train(used, max_steps=5) == "" and steps(used) == [0, 1, 2, 3, 4]
